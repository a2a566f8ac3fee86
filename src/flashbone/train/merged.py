"""The merged model at the end of a run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft

from flashbone.files.outputs import whole_or_absent
from flashbone.merge import merge_checkpoint
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import Recipe, is_pth


def write_merged(recipe: Recipe, folder: RunFolder, trainer: Any, load_plain: Callable[[], Any]) -> None:
    """Write the merged model, whole or not at all: as a folder, and that of a `.pth` file as one of the same kind.

    Args:
        recipe: The recipe.
        folder: Of the run; its adapter has been saved.
        trainer: With the adapted model and the tokenizer.
        load_plain: Loads the model without adapter and quantisation.
    """
    if is_pth(recipe.model):  # as `flashbone merge` does, in the file's own dtype; it takes an older one's place
        with whole_or_absent(folder.path / "merging", replace=True) as place:
            merged = place / folder.merged_pth.name
            merge_checkpoint(Path(recipe.model).expanduser(), folder.adapter, merged)
            os.replace(merged, folder.merged_pth)
        (folder.path / "merging").rmdir()
        return
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.quantization:  # into the weights as they are on disk: quantised ones would lose much of the adapter
        adapted = peft.PeftModel.from_pretrained(load_plain(), folder.adapter)
    merged = adapted.merge_and_unload()
    with whole_or_absent(folder.merged, replace=True) as partial:
        merged.save_pretrained(partial)
        trainer.processing_class.save_pretrained(partial)
