"""A method on a model: an adapter by PEFT, or the model's own parameters; and its size on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashbone.compare.bounds import find_classifiers
from flashbone.compare.methods import TrainingMethod
from flashbone.errors import ConfigError, FlashboneError
from flashbone.train.adapters import same_compilers

# PEFT warns of these while it does what was asked.
_EXPECTED = (
    "fan_in_fan_out is set to",  # it is then set right for the layer
    "Failed to load the CUDA extension",  # BOFT; only what needs no extension is let through
    "Setting boft_n_butterfly_factor to 1",
    "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers by an old name
)
_ADJUSTED = r"Invalid `\w+` \("  # OFT takes another block where the one that was asked for does not divide a layer


def attach(model: Any, method: TrainingMethod, config: Any, seed: int) -> Any:
    """Make a model train by this method. The model is changed, also when this fails: load it again then.

    Args:
        model: With its weights, or on the meta device to count them. Bounds in half precision become fp32: `full` as a
            whole, `linear` its head.
        method: One of `METHODS`.
        config: A new one of `method.config`; None of a bound.
        seed: Of the adapter's start; torch is seeded with it.

    Returns:
        A PeftModel; of a bound the model itself.

    Raises:
        ConfigError: the method cannot be attached to this model; in one line, with the method's name.
    """
    torch.manual_seed(seed)
    try:
        is_quantized = getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None)
        if method.needs_weights and is_quantized:
            raise ConfigError("it cannot train on a quantised base; leave the method or the quantisation out")
        if method.train is not None:
            return method.train(model)
        if method.seed_field and not getattr(config, method.seed_field):
            setattr(config, method.seed_field, seed)
        adapted = _with_adapter(model, config)
        if method.check_layer is not None:
            for name, layer in tuner_layers(adapted):
                method.check_layer(name, layer, layer.r[adapted.active_adapter])
        return adapted
    except FlashboneError as error:
        prefix = f"{method.name}: "
        raise ConfigError(prefix + str(error).removeprefix(prefix)) from error


def _with_adapter(model: Any, config: Any) -> Any:
    """`get_peft_model`, which saves what the checkpoint lacks, too; without the warnings that are not the user's, and
    with errors for what it would adjust."""
    from peft import get_peft_model

    from flashbone.tuner.model.whole import modules_to_add

    config.modules_to_save = [*(config.modules_to_save or ()), *modules_to_add(model, config)] or None
    try:
        with warnings.catch_warnings(), same_compilers():
            for text in _EXPECTED:
                warnings.filterwarnings("ignore", text)
            warnings.filterwarnings("error", _ADJUSTED)
            return get_peft_model(model, config)
    except (FlashboneError, torch.OutOfMemoryError):
        raise
    except UserWarning as error:
        raise ConfigError(f"{str(error).partition('!')[0]}; choose one that divides the inputs of all layers") from None
    except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers of a PeftModel with their names in the base, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.removeprefix("base_model.model."), module


def count_trained(model: Any, method: TrainingMethod) -> tuple[int, int]:
    """How many parameters train: the adapter's (a bound's without a classification head), and all."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = {id(p) for head in find_classifiers(model) for p in head.parameters()} if method.is_bound else set()
    prefix = "" if method.is_bound else model.base_model.prefix
    adapter = sum(p.numel() for name, p in trained.items() if prefix in name and id(p) not in heads)
    return adapter, sum(p.numel() for p in trained.values())


def adapter_bytes(model: Any) -> int:
    """Bytes of the parameters that train."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def save_adapter(model: Any, folder: Path) -> int:
    """Save the adapter in PEFT's format; returns the bytes of its tensors' and its configuration's files."""
    # Otherwise PEFT looks up the base's vocabulary on the hub, to see whether it has grown.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return sum(file.stat().st_size for file in folder.glob("adapter_*"))
