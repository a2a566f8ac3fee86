"""The merged model at the end of a run, by the same merge as `flashbone merge`."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from transformers.utils.hub import cached_file

from flashbone.errors import ConfigError
from flashbone.files.base import INDEX, SINGLE, open_base
from flashbone.files.outputs import PARTIAL, whole_or_absent
from flashbone.merge import merge_checkpoint
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import Recipe, is_pth


def find_merge_base(recipe: Recipe, folder: RunFolder) -> Path | None:
    """The folder or `.pth` file that the adapter will be merged into, checked before the training.

    Returns:
        None where no file holds that model as it trains: a new classification head, GGUF, pickled weights.

    Raises:
        ConfigError: the output lies inside the model's folder.
        FormatError: the model's files cannot be merged into.
    """
    if recipe.task == "classification" or recipe.model.endswith(".gguf"):
        return None
    if is_pth(recipe.model):
        return Path(recipe.model).expanduser()
    revision = (recipe.training.get("model_init_kwargs") or {}).get("revision")
    base = Path(cached_file(str(Path(recipe.model).expanduser()), "config.json", revision=revision) or "").parent
    if not any((base / name).is_file() for name in (SINGLE, INDEX)):
        return None
    if folder.path.resolve().is_relative_to(base.resolve()):
        raise ConfigError(f"merge: output {folder.path} lies inside the model's folder {base}; choose another output")
    open_base(base)
    return base


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
        with whole_or_absent(folder.merged, replace=True) as partial:
            merged_model.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
        return
    target = folder.merged_pth if base.suffix == ".pth" else folder.merged
    with tempfile.TemporaryDirectory(prefix="merging", suffix=PARTIAL, dir=folder.path) as place:
        merged = Path(place) / target.name
        merge_checkpoint(base, folder.adapter, merged)
        if merged.is_dir():
            trainer.processing_class.save_pretrained(merged)  # training may have given it a chat template
            shutil.rmtree(target, ignore_errors=True)
        os.replace(merged, target)
