"""Checkpoints that say what they hold: a manifest of sizes and hashes, written when every other file is on disk."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flashbone.errors import FormatError
from flashbone.files.beside import GENERATION
from flashbone.files.outputs import write_text
from flashbone.files.records import read_record, to_json
from flashbone.files.sources import sha256

MANIFEST, STATE = "manifest.json", "trainer_state.json"
UNFINISHED = "was not written to its end"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint by their names inside it."""

    sizes: dict[str, int]
    sha256: dict[str, str]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the oldest first."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", place.name), place) for place in folder.glob("checkpoint-*")]
    return [place for _, place in sorted((int(match[1]), place) for match, place in named if match and place.is_dir())]


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def best_step(trainer: Any) -> int | None:
    """The step of the best weights, if the run keeps those and not the last."""
    is_kept = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    return trainer.state.best_global_step if is_kept else None


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    if not (checkpoint / MANIFEST).exists():
        return UNFINISHED
    try:
        manifest = read_record(Manifest, checkpoint / MANIFEST, "it is damaged")
        if STATE not in manifest.sizes:
            return f"{MANIFEST} is damaged"
        for name, size in manifest.sizes.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            if sha256(file) != manifest.sha256.get(name):
                return f"{name} is damaged"
    except (FormatError, OSError) as error:
        return str(error)
    return None


def write_stops(trainer: Any, folder: Path) -> None:
    """Write the model's generation settings beside its adapter if training changed which tokens end an answer."""
    if getattr(trainer, "stops_anew", False):
        settings = trainer.accelerator.unwrap_model(trainer.model).generation_config
        settings.to_json_file(folder / GENERATION)  # save_pretrained refuses what bases may have


def write_manifest(checkpoint: Path) -> None:
    """Record the size and hash of every file in the checkpoint."""
    names = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    names = [name for name in names if name != MANIFEST]
    sizes = {name: (checkpoint / name).stat().st_size for name in names}
    hashes = {name: sha256(checkpoint / name) for name in names}
    write_text(checkpoint / MANIFEST, to_json(Manifest(sizes, hashes)))


class Checkpoints(TrainerCallback):
    """Adds the manifest to each checkpoint, and only then removes those beyond `save_total_limit`, so a kill at any
    moment leaves a whole one. Always keeps the best.

    Args:
        trainer: Whose checkpoints they are; it no longer removes any itself.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.accelerator = trainer, trainer.accelerator
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.best_model_checkpoint:  # the run may have been moved
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / Path(state.best_model_checkpoint).name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        write_stops(self.trainer, folder / f"checkpoint-{state.global_step}")
        write_manifest(folder / f"checkpoint-{state.global_step}")
        best = Path(state.best_model_checkpoint or "").name
        for old in checkpoints(folder)[: -self.limit] if self.limit and self.limit > 0 else ():
            if old.name != best:
                shutil.rmtree(old, ignore_errors=True)
