"""Training on rows with images: a processor in the tokenizer's place, and rows as TRL's vision path takes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from flashbone.errors import ConfigError
from flashbone.train.data.images import ends_of, for_trl
from flashbone.train.data.loading import Data
from flashbone.train.data.origins import elsewhere, sources_of
from flashbone.train.data.prepared import Counts
from flashbone.train.models import load, locate
from flashbone.train.recipe import Recipe


def load_processor(recipe: Recipe, args: Any, tokenizer: Any, is_a_run: bool) -> Any:
    """The model's processor, with the tokenizer that the run trains with.

    Raises:
        ConfigError: the model sees no images; or they are for something else than a run of task sft.
    """
    if recipe.task != "sft" or not is_a_run:
        raise ConfigError("the data hold images, which `flashbone train` alone learns from, with task sft")
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    processor = load(AutoProcessor, recipe.model, locate(recipe.model)[0], **trust)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ConfigError(f"model {recipe.model}: the data hold images, but the model has no processor for them")
    processor.tokenizer = tokenizer
    processor.chat_template = tokenizer.chat_template
    return processor


def with_images(recipe: Recipe, args: Any, data: Data, processor: Any, model: Any) -> tuple[Data, list[Counts]]:
    """The data as TRL's trainer takes them, and what is learned of them. Nothing is cut, unless the recipe sets
    a length: a cut image would have fewer tokens than the model has patches of it.

    Raises:
        ConfigError: answers have no end, or the rows are for something else than a training.
        FormatError: an image cannot be read.
    """
    if recipe.training.get("max_length") is None:
        args.max_length = None
    places = [
        place for source in sources_of(recipe.data) for place in (source, elsewhere(source, source.eval)) if place
    ]
    places += [place] if (place := elsewhere(recipe.data, recipe.data.eval)) else []
    folders = [path.parent if path.is_file() else path for path in (Path(place.path) for place in places)]
    train = for_trl(data.train, folders)
    held_out = None if data.eval is None else for_trl(data.eval, folders)
    return replace(data, train=train, eval=held_out), [Counts(rows=len(train), ends=ends_of(train, processor))]
