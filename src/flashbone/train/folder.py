"""A run's output folder: fresh, resumable or finished.

recipe.json  inputs.json  checkpoint-*/  metrics.jsonl  adapter/  merged/ (of a .pth model merged.pth)  loss.png
summary.json (last: the run is finished)
"""

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import LOCK, PARTIAL, alone, write_text
from flashbone.files.records import read_record, to_json
from flashbone.train.checkpoints import UNFINISHED, checkpoints, problem
from flashbone.train.inputs import Inputs, check_same
from flashbone.train.recipe import Recipe
from flashbone.train.summary import Summary

log = logging.getLogger(__name__)

REMEDY = "delete it, or choose another output"
_FULL, _LITTLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), 2**20  # bytes of a disk that is as good as full
# What decides the losses: a resumed run must not change it.
# `training` may change (more steps), with a notice, but for what a checkpoint's optimiser brings along: another value
# would be ignored. `learning_rates` are its groups.
FIXED = ("model", "task", "data", "adapter", "init_adapter", "quantization", "rwkv", "seed")
OF_THE_OPTIMIZER = ("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay")
OF_THE_OPTIMIZER += ("adam_beta1", "adam_beta2", "adam_epsilon")


class RunFolder:
    """Paths and states of one run's output."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.inputs = self.path / "inputs.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.merged_pth = self.path / "merged.pth"  # of a .pth model

    def holds_a_run(self) -> bool:
        return self.recipe.exists() or self.summary.exists() or bool(checkpoints(self.path))

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of which every file is as it was written."""
        return next((place for place in reversed(checkpoints(self.path)) if problem(place) is None), None)

    def remove_partial(self) -> None:
        """Remove damaged checkpoints and what a failed or killed save left."""
        for place in checkpoints(self.path):
            if problem(place) is not None:
                shutil.rmtree(place, ignore_errors=True)
        for place in self.path.glob(f"*{PARTIAL}"):
            if place.name != LOCK:
                shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)

    @contextlib.contextmanager
    def forgotten_unless(self, has_begun: Callable[[], Any]) -> Iterator[None]:
        """Undo the start of a run that ends before its first step, so that the folder holds none."""
        try:
            yield
        except BaseException:  # Ctrl-C, too
            if not has_begun() and not checkpoints(self.path):
                for file in (self.recipe, self.inputs, self.metrics):
                    file.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def claimed(recipe: Recipe, resume: bool) -> Iterator[None]:
    """Make the output folder, keep other runs out of it, and leave none behind that is empty.

    Raises:
        ConfigError: as `claim`; or another run is writing to it.
    """
    with alone(Path(recipe.output)):
        claim(recipe, resume)
        yield


def claim(recipe: Recipe, resume: bool) -> None:
    """Check that this run may have the output folder.

    Raises:
        ConfigError: the folder holds a run and `resume` was not asked for, or that run had another recipe, or all its
            checkpoints are damaged.
    """
    folder = RunFolder(recipe.output)
    if folder.holds_a_run() and not resume:
        raise ConfigError(
            f"output {folder.path} already holds a run; continue it with --resume, or choose another output"
        )
    if folder.recipe.exists():
        before = _compare(recipe, folder)
        if before.training.get("save_only_model") and checkpoints(folder.path):
            raise ConfigError(
                f"output {folder.path}: its checkpoints hold no optimiser (training.save_only_model), so the run cannot"
                " go on to the same losses; begin again in another output, with a checkpoint as init_adapter"
            )
    if resume:
        _report_checkpoints(folder)


def _report_checkpoints(folder: RunFolder) -> None:
    """Name the checkpoints that cannot be used.

    Raises:
        ConfigError: there were some, and all are damaged.
    """
    problems: dict[str, str] = {}
    for place in reversed(checkpoints(folder.path)):
        wrong = problem(place)
        if wrong is None:
            break
        problems[place.name] = wrong
    else:
        damaged = "; ".join(f"{name}: {wrong}" for name, wrong in problems.items() if wrong != UNFINISHED)
        if damaged:
            raise ConfigError(
                f"output {folder.path}: no checkpoint is whole ({damaged}); delete the folder to begin again, or choose"
                " another output"
            )
        log.info("resume: no checkpoint in %s; starting from the beginning", folder.path)
    for name, wrong in problems.items():
        log.warning("resume: %s is not used: %s", folder.path / name, wrong)


def check_inputs(folder: RunFolder, inputs: Inputs) -> None:
    """Check that a resumed run reads what it read before; its batch may differ if there is no checkpoint yet.

    Raises:
        ConfigError: it does not; what changed is named.
    """
    is_kept = folder.last_checkpoint() is not None
    if is_kept or folder.inputs.exists():
        check_same(read_record(Inputs, folder.inputs, REMEDY), inputs, folder.path, with_batch=is_kept)


def record(recipe: Recipe, inputs: Inputs) -> None:
    """Record the recipe and the inputs: from here on the folder holds a run."""
    folder = RunFolder(recipe.output)
    folder.summary.unlink(missing_ok=True)
    new = [file for file in (folder.recipe, folder.inputs) if not file.exists()]
    try:
        write_text(folder.recipe, to_json(recipe))
        write_text(folder.inputs, to_json(inputs))
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        raise


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
    pairs = {name: (before[name], now[name]) for name in FIXED}
    pairs["training.learning_rates"] = (_rates(before), _rates(now))
    if checkpoints(folder.path):
        pairs |= {
            f"training.{name}": (before["training"].get(name), now["training"].get(name)) for name in OF_THE_OPTIMIZER
        }
    changed = [f"{name}{_change(*pair)}" for name, pair in pairs.items() if pair[0] != pair[1]]
    if changed:
        raise ConfigError(
            f"output {folder.path} holds a run of another recipe: {'; '.join(changed)}; "
            "resume with the same one, or choose another output"
        )
    if before["training"] != now["training"]:
        log.info("resume: training is now %s, was %s", now["training"], before["training"])
    return run


def _rates(plain: dict[str, Any]) -> list[Any]:
    """Learning rates by group, in their order."""
    return list(plain["training"].get("learning_rates", {}).items())


def _plain(recipe: Recipe) -> dict[str, Any]:
    return json.loads(to_json(recipe))


def _change(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return "".join(f".{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names[:1])
    return f" was {before!r}, is {now!r}"


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
        problem = "no space left on device; free some"
        if _has_size_limit() and not shutil.disk_usage(folder.path).free < _LITTLE:
            problem = "a file would be larger than this process may write (ulimit -f); raise the limit"
        raise FlashboneError(f"{folder.path}: {problem}, then continue with --resume") from error


def _has_size_limit() -> bool:
    try:
        import resource
    except ImportError:  # Windows
        return False
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


def _says_disk_full(error: BaseException) -> bool:
    # The last two are torch's zip writer, which finds its file shorter than what it wrote.
    signs = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos")
    return getattr(error, "errno", None) in _FULL or any(sign in str(error) for sign in signs)
