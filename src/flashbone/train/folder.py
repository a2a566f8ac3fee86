"""A run's output folder: fresh, resumable or finished.

recipe.json  checkpoint-*/  metrics.jsonl  adapter/  merged/ (of a .pth model merged.pth)  loss.png
summary.json (last: the run is finished)
"""

import contextlib
import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import PARTIAL, make_folder, write_text
from flashbone.files.records import read_record, to_json
from flashbone.train.recipe import Recipe
from flashbone.train.summary import Summary

log = logging.getLogger(__name__)

REMEDY = "delete it, or choose another output"
# What decides the losses: a resumed run must not change it. `training` may change (more steps), with a notice.
FIXED = ("model", "task", "data", "adapter", "init_adapter", "quantization", "rwkv", "seed")


class RunFolder:
    """Paths and states of one run's output."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.merged_pth = self.path / "merged.pth"  # of a .pth model

    def holds_a_run(self) -> bool:
        return self.recipe.exists() or self.summary.exists() or bool(self._checkpoints())

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end; a kill while saving leaves one that was not."""
        return next((folder for _, folder in reversed(self._checkpoints()) if _is_complete(folder)), None)

    def remove_partial(self) -> None:
        """Take away what a failed or killed save left behind."""
        for _, folder in self._checkpoints():
            if not _is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
        for folder in self.path.glob(f"*{PARTIAL}"):
            shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink(missing_ok=True)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        checkpoints = []
        for folder in self.path.glob("checkpoint-*"):
            match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
            if match and folder.is_dir():
                checkpoints.append((int(match.group(1)), folder))
        return sorted(checkpoints)


def claim(recipe: Recipe, resume: bool) -> None:
    """Make the output folder, if this run may have it.

    Raises:
        ConfigError: the folder holds a run and `resume` was not asked for, or that run had another recipe.
    """
    folder = RunFolder(recipe.output)
    make_folder(folder.path)
    if folder.holds_a_run() and not resume:
        raise ConfigError(
            f"output {folder.path} already holds a run; continue it with --resume, or choose another output"
        )
    if folder.recipe.exists():
        _compare(recipe, folder)
    folder.remove_partial()
    if resume and folder.last_checkpoint() is None:
        log.info("resume: no checkpoint in %s; starting from the beginning", folder.path)


def record(recipe: Recipe) -> None:
    """Write the recipe down: from here on the folder holds a run."""
    folder = RunFolder(recipe.output)
    folder.summary.unlink(missing_ok=True)
    write_text(folder.recipe, to_json(recipe))


def release(recipe: Recipe) -> None:
    """Leave no empty folder behind a run that never began."""
    with contextlib.suppress(OSError):
        Path(recipe.output).rmdir()


def finished(recipe: Recipe) -> Summary | None:
    """The summary of the run in the output folder, if it was finished with this same `training`."""
    folder = RunFolder(recipe.output)
    if not (folder.summary.exists() and folder.recipe.exists()):
        return None
    before = _compare(recipe, folder)
    return read_record(Summary, folder.summary, REMEDY) if before.training == _plain(recipe)["training"] else None


def _compare(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe of the run in the folder, if it leads to the same losses as this one."""
    run = read_record(Recipe, folder.recipe, REMEDY)  # an earlier version may lack fields
    now, before = _plain(recipe), _plain(run)
    changed = [f"{name}{_change(before[name], now[name])}" for name in FIXED if before[name] != now[name]]
    if changed:
        raise ConfigError(
            f"output {folder.path} holds a run of another recipe: {'; '.join(changed)}; "
            "resume with the same one, or choose another output"
        )
    if before["training"] != now["training"]:
        log.info("resume: training is now %s, was %s", now["training"], before["training"])
    return run


def _plain(recipe: Recipe) -> dict[str, Any]:
    return json.loads(to_json(recipe))


def _change(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return "".join(f".{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names[:1])
    return f" was {before!r}, is {now!r}"


def _is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer finished writing it: its state comes last."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "global_step" in state and (checkpoint / "adapter_config.json").exists()


@contextlib.contextmanager
def disk_errors(folder: RunFolder) -> Iterator[None]:
    """Turn the many faces of a full disk into one clear error, and remove what was half-written.

    torch's and safetensors' writers raise errors of their own, without an errno.
    """
    try:
        yield
    except Exception as error:
        if not _says_disk_full(error):
            raise
        folder.remove_partial()
        raise FlashboneError(
            f"{folder.path}: no space left on device; free some, then continue with --resume"
        ) from error


def _says_disk_full(error: BaseException) -> bool:
    # The last two are torch's zip writer, which finds its file shorter than what it wrote.
    signs = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in signs)
