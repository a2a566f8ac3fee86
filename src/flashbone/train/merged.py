"""The merged model at the end of a run, by the same merge as `flashbone merge` where the model's files allow it."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from transformers.utils.hub import cached_file

from flashbone.errors import ConfigError
from flashbone.files import names
from flashbone.files.base import INDEX, SINGLE, open_base
from flashbone.files.beside import beside, tokenizer_folder
from flashbone.files.outputs import PARTIAL, whole_or_absent
from flashbone.merge import merge_checkpoint
from flashbone.merge.plan import plan_edits, read_adapters
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import Recipe, is_pth
from flashbone.train.tasks import TASKS

log = logging.getLogger(__name__)


def find_merge_base(recipe: Recipe, folder: RunFolder, trainer: Any) -> Path | None:
    """The folder or `.pth` file that the adapter will be merged into, checked before the training.

    Args:
        recipe: The recipe.
        folder: Of the run.
        trainer: With the adapted model, before its first step.

    Returns:
        None where no file holds that model as it trains: a new classification head, GGUF, pickled weights, tensors
        that transformers renames or fuses when it loads them.

    Raises:
        ConfigError: the output lies inside the model's folder.
        FormatError, ShapeError: the adapter cannot be merged into the model's files.
    """
    base = _base_files(recipe)
    if base is None:
        return None
    if base.is_dir() and folder.path.resolve().is_relative_to(base.resolve()):
        raise ConfigError(f"merge: output {folder.path} lies inside the model's folder {base}; choose another output")
    model, adapted = open_base(base), trainer.accelerator.unwrap_model(trainer.model)
    with tempfile.TemporaryDirectory(prefix="merging", suffix=PARTIAL, dir=folder.path) as place:
        adapted.save_pretrained(place, save_embedding_layers=False)
        weighted = read_adapters([place], None)
        adapter = weighted[0].adapter
        wanted = [*map(adapter.parameter, adapter.blocks), *adapter.replacements]
        _, lost = names.locate(wanted, model.entries)
        is_tied = getattr(
            adapted.config, "tie_word_embeddings", True
        )  # then a file may hold both embeddings as one tensor
        embeddings = (*names.OUTPUT_EMBEDDINGS, *names.INPUT_EMBEDDINGS) if is_tied else ()
        if renamed := [name for name in lost if not names.is_embedding(name, embeddings)]:
            log.info("merge: the files of %s do not hold %s; merging the loaded model", recipe.model, renamed[0])
            return None
        plan_edits(model, weighted)
    return base


def _base_files(recipe: Recipe) -> Path | None:
    """The model's folder, if it has safetensors, or its `.pth` file; None for other files and for classifiers."""
    if TASKS[recipe.task].is_classifier or recipe.model.endswith(".gguf"):
        return None
    if is_pth(recipe.model):
        return Path(recipe.model).expanduser()
    revision = (recipe.training.get("model_init_kwargs") or {}).get("revision")
    base = Path(cached_file(str(Path(recipe.model).expanduser()), "config.json", revision=revision) or "").parent
    return base if any((base / name).is_file() for name in (SINGLE, INDEX)) else None


def write_merged(folder: RunFolder, base: Path | None, trainer: Any, load_plain: Callable[[], Any] | None) -> None:
    """Write the merged model, whole or not at all; it takes an older one's place.

    Args:
        folder: Of the run; its adapter has been saved.
        base: From `find_merge_base`.
        trainer: With the adapted model and the tokenizer.
        load_plain: Loads the model without adapter and quantisation; None if the trainer's is not quantised.
    """
    if base is None:
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        if load_plain is not None:  # merging into quantised weights would lose much of the adapter
            adapted = peft.PeftModel.from_pretrained(load_plain(), folder.adapter)
        merged_model = adapted.merge_and_unload()
        if is_pth(str(merged_model.name_or_path)):  # with a learned state, which the base's file has no place for
            with tempfile.TemporaryDirectory(prefix="merging", suffix=PARTIAL, dir=folder.path) as place:
                merged_model.to_pth(Path(place) / folder.merged_pth.name)
                os.replace(Path(place) / folder.merged_pth.name, folder.merged_pth)
            return
        with whole_or_absent(folder.merged, replace=True) as partial:
            merged_model.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
            beside([folder.adapter]).copy_to(partial)
        return
    target = folder.merged_pth if base.suffix == ".pth" else folder.merged
    with tempfile.TemporaryDirectory(prefix="merging", suffix=PARTIAL, dir=folder.path) as place:
        merged = Path(place) / target.name
        merge_checkpoint(base, folder.adapter, merged)
        if merged.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        os.replace(merged, target)
        if tokenizer_folder(merged).is_dir():
            shutil.rmtree(tokenizer_folder(target), ignore_errors=True)
            os.replace(tokenizer_folder(merged), tokenizer_folder(target))
