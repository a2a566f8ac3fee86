"""The model that is evaluated, with its adapter, and what the run that trained the adapter recorded."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import GenerationConfig

from flashbone.errors import ConfigError, FormatError
from flashbone.files.beside import GENERATION, beside_model
from flashbone.files.records import read_record
from flashbone.train.adapters import attach_adapter, attach_adapters
from flashbone.train.models import load, load_causal_lm, load_classifier, load_config, quantized
from flashbone.train.recipe import Quantization, Recipe, is_pth
from flashbone.train.summary import Summary
from flashbone.train.tokenizers import load_tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")


def recorded_labels(adapter: Path | None) -> list[str]:
    """The classes, in the order of the head's outputs, by the run that trained the adapter; none if that is unknown."""
    summary = _recorded(Summary, adapter, "summary.json")
    return summary.labels if summary else []


def recorded_max_length(adapter: Path | None) -> int | None:
    """The tokens of a row that the run that trained the adapter read; None if that is unknown."""
    recipe = _recorded(Recipe, adapter, "recipe.json")
    return recipe.training.get("max_length") if recipe else None


def _recorded(kind: type[T], adapter: Path | None, name: str) -> T | None:
    """What the run that left this adapter wrote; a file of that name that is another program's is named and left."""
    file = _beside(adapter, name)
    try:
        return read_record(kind, file, "it is ignored") if file else None
    except FormatError as error:
        log.warning("%s", error)
        return None


def _beside(adapter: Path | None, name: str) -> Path | None:
    """A file in the output folder of the run that left this adapter, or a checkpoint with it."""
    file = adapter.resolve().parent / name if adapter is not None and adapter.is_dir() else None
    return file if file is not None and file.is_file() else None


def load_language_model(
    name: str,
    adapter: Path | Mapping[str, Path] | None,
    dtype: Any,
    device: Any,
    *,
    merge: bool = False,
    vocabulary: str | None = None,
    quantization: Quantization | None = None,
) -> tuple[Any, Any]:
    """The model in eval mode on the device, with its adapter, and the tokenizer.

    Args:
        name: A folder, hub id, .gguf file, or an RWKV model's .pth file.
        adapter: Of any format that flashbone reads, or a folder of any of PEFT's methods; or several by their names.
        dtype: Of the base.
        device: Where it goes.
        merge: Put the adapter into the weights.
        vocabulary: A file of an RWKV model's tokens.
        quantization: Load the base in few bits.

    Raises:
        ConfigError: there is no such model or adapter, or the adapter is a classifier's.
        FormatError, ShapeError: the adapter cannot be read, or does not fit the model.
    """
    adapters = {"default": adapter} if isinstance(adapter, Path) else dict(adapter or {})
    brought = beside_model(name, [*adapters.values()])
    if "differ" in brought.words:
        log.warning("%s", brought.words)
    tokenizer = load_tokenizer(name, vocabulary, [*adapters.values()])
    few_bits = quantized(name, quantization, dtype)
    model = load_causal_lm(name, dtype, **few_bits, **({"device_map": {"": device}} if few_bits else {}))
    if adapters:
        model = attach_adapters(model, adapters, "CAUSAL_LM")
        model = model.merge_and_unload() if merge else model
    generation = brought.files.get(GENERATION)
    if generation is not None:
        model.generation_config = load(GenerationConfig, str(generation.parent), str(generation.parent))
    return (model if few_bits else model.to(device)).eval(), tokenizer


def load_labelled_classifier(
    name: str, adapter: Path | None, dtype: Any, device: Any, *, labels: list[str] | None = None, merge: bool = False
) -> tuple[Any, Any, list[str]]:
    """The classifier in eval mode on the device, with its adapter; the tokenizer; and the classes in the head's order.

    Args:
        name: As for `load_language_model`.
        adapter: As there.
        dtype: Of the base.
        device: Where it goes.
        labels: The classes; None for those of the adapter's run, or of the model's configuration.
        merge: Put the adapter into the weights.

    Raises:
        ConfigError: there is no such model or adapter, the classes are not known, or nothing brings a trained head.
        FormatError, ShapeError: the adapter cannot be read, or does not fit the model.
    """
    if is_pth(name):
        raise ConfigError(f"model {name}: an RWKV model cannot classify; a classifier has no .pth format")
    tokenizer = load_tokenizer(name, adapters=() if adapter is None else [adapter])
    config = load_config(name)
    has_head = any("SequenceClassification" in architecture for architecture in config.architectures or ())
    labels = labels or recorded_labels(adapter) or (_labels_of(config) if has_head else [])
    if not labels:
        where = "the model's config.json has no names for them" if has_head else "the model has no classification head"
        beside = "" if adapter is None else f", and no summary.json of `flashbone train` lies beside {adapter}"
        raise ConfigError(f"labels of {name}: not known: {where}{beside}; give them in the head's order with --labels")
    if has_head and config.num_labels != len(labels) and adapter is None:
        raise ConfigError(
            f"labels of {name}: got {len(labels)} ({', '.join(labels)}), its head has {config.num_labels}"
        )
    if not has_head and adapter is None:
        raise ConfigError(
            f"model {name}: has no trained classification head; give the adapter that was trained with one"
        )
    model = load_classifier(name, dtype, labels, tokenizer, warn_of_new_head=has_head)
    if adapter is not None:
        model = attach_adapter(model, adapter, "SEQ_CLS", merge)
    return model.to(device).eval(), tokenizer, labels


def _labels_of(config: Any) -> list[str]:
    """A configuration's names of its classes; none where they are transformers' place-holders."""
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    return [] if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
