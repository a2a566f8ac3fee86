"""Names of blocks in adapter files: they say which parameter a block belongs to, and how that is stored."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.layers.parameters import ParameterKind, ParamWrapper, own_name

BLOCK = "bone_block"
# The block of a weight that is stored (in, out): an embedding's table, experts with `is_transposed`. transformers'
# Conv1D keeps the plain name, which PEFT 0.14 to 0.18 know.
BLOCK_OF_TRANSPOSED = "bone_transposed"
FSDP1 = "_fsdp_wrapped_module."
VALUE = "bone_value"  # of a single parameter, whose key in a file is the parameter's name
_ROOT = "base_model.model."  # PEFT's, of a PeftModel
_WRAPPED_BY_HOSTS = (FSDP1, "_orig_mod.")
_WRAPPERS = re.compile(r"(?:^|\.)(?:base_layer|original_module|_orig_mod|_fsdp_wrapped_module)(?=\.|$)")
_VALUE = re.compile(rf"\.{VALUE}(\.[^.]+)?$")
_OF_ADAPTERS = "bone_[a-z]+|modules_to_save|trainable_tokens_[a-z]+"  # what holds a tensor for each adapter


def file_keys(model: nn.Module) -> dict[str, str]:
    """Key of a block in the model -> key in a file, both without the adapter's name, where they differ."""
    return {live: key for live, key in _block_keys(model).items() if live != key}


def _block_keys(model: nn.Module) -> dict[str, str]:
    modules = [(plain(name), module) for name, module in model.named_modules()]
    wrappers = [name for name, module in modules if isinstance(module, ParamWrapper)]
    names = {}
    for name, layer in modules:
        if not isinstance(layer, BoneLayer):
            continue
        kind = layer.base_kind
        is_transposed = isinstance(layer, BoneEmbedding) or (isinstance(kind, ParameterKind) and kind.is_transposed)
        block = BLOCK_OF_TRANSPOSED if is_transposed else BLOCK
        names[f"{name}.{BLOCK}"] = f"{own_name(name, layer, wrappers)}.{block}"
    return names


def to_file(model: nn.Module, state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Part of a model's state under the names of files, which still end in the adapter's name."""
    end = f".{adapter_name}"
    names = {f"{live}{end}": f"{key}{end}" for live, key in file_keys(model).items()}
    return {names.get(key, key): tensor for key, tensor in state.items()}


def from_file(model: nn.Module, state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """A file's state under the model's names where they differ; those of blocks then end in the adapter's name."""
    names = {key: f"{live}.{adapter_name}" for live, key in file_keys(model).items()}
    names |= {f"{_ROOT}{key}": name for key, name in names.items()}
    # In the model of a PeftModel the names begin with the root themselves.
    return {names.get(key, key): tensor for key, tensor in as_now(model, state, adapter_name).items()}


def as_now(model: nn.Module, state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """A file's state under the names of today's files: those of files that were saved from a wrapped model
    (torch.compile, DDP, FSDP1), or for transformers' former names of modules, differ."""
    known = {*_block_keys(model).values(), *(plain(name) for name in model.state_dict())}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            known |= {f"{plain(name)}.{key}" for key in module.adapter_state_dict_load_map(adapter_name)}
    known |= {f"{_ROOT}{name}" for name in known}
    renamed = functools.cache(functools.partial(_renaming, model))

    def name_now(key: str) -> str:
        name = plain(key)
        name = name.removeprefix("module.") if name.startswith(f"module.{_ROOT}") else name
        if key in known or name in known:
            return key if key in known else name
        now = renamed()(name.removeprefix(_ROOT))
        return next((other for other in (f"{_ROOT}{now}", now) if other in known), name)

    return {name_now(key): tensor for key, tensor in state.items()}


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers renames in the names of older checkpoints of this model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [entry for entry in get_model_conversion_mapping(base) if isinstance(entry, WeightRenaming)]
    except (ImportError, AttributeError):  # older transformers, where PEFT renames by itself; no model of transformers
        return lambda name: name
    return lambda name: rename_source_key(name, renamings, [])[0]


def without_adapter(key: str, adapter_name: str) -> str:
    """A key without the adapter's name, which may also be that of a module or a parameter."""
    return re.sub(rf"\.({_OF_ADAPTERS})\.{re.escape(adapter_name)}(?=\.|$)", r".\1", key)


def without_copies(state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The state without second copies from modules that are trained whole, which PEFT writes where it saves embeddings
    or all biases, too: `lm_head.modules_to_save.weight` beside `lm_head.weight`, whose key has the adapter's name by
    now."""

    def is_copy(key: str) -> bool:
        module, mark, leaf = key.rpartition(".modules_to_save.")
        return bool(mark) and f"{module}{mark}{adapter_name}.{leaf}" in state

    return {key: tensor for key, tensor in state.items() if not is_copy(key)}


def of_other_adapters(original: Callable) -> Callable:
    """PEFT's function that drops other adapters' tensors, which looks for their names anywhere in a key: adapters "0"
    and "weight" would take layers 0 and all weights out of every file."""

    @functools.wraps(original)
    def filtered(state_dict: dict[str, Tensor], unwanted_adapter_names: list[str]) -> dict[str, Tensor]:
        if not any(f".{BLOCK}." in key for key in state_dict):
            return original(state_dict, unwanted_adapter_names)
        names = "|".join(map(re.escape, unwanted_adapter_names)) or "(?!)"
        others = re.compile(rf"\.({_OF_ADAPTERS}|(?:lora|ia3|oft|hra)_\w+)\.({names})(\.|$)")
        return {key: tensor for key, tensor in state_dict.items() if not others.search(key)}

    return filtered


def bare(name: str) -> str:
    """A name without the parts that adapters and hosts add."""
    return _VALUE.sub("", _WRAPPERS.sub("", name).removeprefix("."))


def plain(name: str) -> str:
    """A module's or tensor's name without the parts that FSDP1 and torch.compile add."""
    for marker in _WRAPPED_BY_HOSTS:
        name = name.replace(marker, "")
    return name
