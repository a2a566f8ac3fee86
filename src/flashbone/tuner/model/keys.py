"""Names of blocks in adapter files: they say which parameter a block belongs to, and how that is stored."""

from __future__ import annotations

import re

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
_WRAPPED_BY_HOSTS = (FSDP1, "_orig_mod.")
_WRAPPERS = re.compile(r"(?:^|\.)(?:base_layer|original_module|_orig_mod|_fsdp_wrapped_module)(?=\.|$)")
_VALUE = re.compile(rf"\.{VALUE}(\.[^.]+)?$")


def file_keys(model: nn.Module) -> dict[str, str]:
    """Key of a block in the model -> key in a file, both without the adapter's name, where they differ."""
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
    return {live: key for live, key in names.items() if live != key}


def to_file(model: nn.Module, state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Part of a model's state under the names of files, which still end in the adapter's name."""
    end = f".{adapter_name}"
    names = {f"{live}{end}": f"{key}{end}" for live, key in file_keys(model).items()}
    return {names.get(key, key): tensor for key, tensor in state.items()}


def from_file(model: nn.Module, state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """A file's state under the model's names where they differ; those end in the adapter's name."""
    names = {}
    for live, key in file_keys(model).items():
        names[key] = names[f"base_model.model.{key}"] = f"{live}.{adapter_name}"
    return {names.get(key, key): tensor for key, tensor in state.items()}


def bare(name: str) -> str:
    """A name without the parts that adapters and hosts add."""
    return _VALUE.sub("", _WRAPPERS.sub("", name).removeprefix("."))


def plain(name: str) -> str:
    """A module's or tensor's name without the parts that FSDP1 and torch.compile add."""
    for marker in _WRAPPED_BY_HOSTS:
        name = name.replace(marker, "")
    return name
