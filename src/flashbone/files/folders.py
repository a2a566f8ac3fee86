"""What the adapter folders of PEFT share, whatever the method: files, how keys name tensors, how to write them.

adapter_config.json          the fields that `fields.py` has for every method, and the method's own
adapter_model.safetensors    or adapter_model.bin:
    base_model.model.<module><suffix>               a tensor of the method for an adapted module
    base_model.model.<module>[.base_layer].bias     a trained bias
    base_model.model.<parameter>                    a parameter of a module to save
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files import fields
from flashbone.files.adapter import same_values
from flashbone.files.sources import read_json
from flashbone.files.states import write_safetensors

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
ROOT = "base_model.model."
# PEFT saves embeddings along with the adapter when they are targeted or were resized, listed nowhere.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")

_TOKENS, _TABLE = ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight"


def read_config(folder: Path, method: str) -> dict[str, Any]:
    """The config of an adapter folder, unchecked but for its method (peft_type).

    Raises:
        FormatError: it is missing, or of another method.
    """
    file = folder / CONFIG
    if not folder.is_dir():
        what = "is a file, wanted the adapter's folder" if folder.exists() else "no such adapter folder"
        raise FormatError(f"{folder}: {what}")
    if not file.is_file():
        raise FormatError(f"{folder}: this folder is no adapter, it has no {CONFIG}")
    config = read_json(file)
    if config.get("peft_type") != method:
        raise FormatError(f"{file}: this is a {fields.shown(config.get('peft_type'))} adapter, wanted {method}")
    return config


def weights_file(folder: Path) -> Path:
    """The file of an adapter folder that holds its tensors.

    Raises:
        FormatError: it is missing.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise FormatError(f"{folder}: this adapter has no weights, wanted {SAFETENSORS} or {PICKLE}")


class SortedTensors(NamedTuple):
    """The tensors of a folder: module -> suffix -> tensor of the method; replacements as in an `Adapter`; and what is
    wrong with the keys."""

    parts: dict[str, dict[str, Tensor]]
    replacements: dict[str, Tensor]
    problems: list[str]


def sort_tensors(state: Mapping[str, Tensor], config: Mapping[str, Any], suffixes: Collection[str]) -> SortedTensors:
    """Sort the tensors of a folder by their keys; nothing is refused here.

    Args:
        state: The tensors.
        config: The checked config.
        suffixes: How the keys of the method's tensors end.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    replacements, problems = {}, []
    state = _with_whole_tables(state, config, problems)
    for key, tensor in state.items():
        name = key.removeprefix(ROOT)
        suffix = next((s for s in suffixes if name.endswith(s)), "")
        parameter = plain_name(name)
        if name == key or not (suffix or is_replacement(parameter, config)):
            problems.append(f"unknown key {key!r}")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: got {tensor.dtype}, wanted floating point numbers")
        elif suffix:
            parts.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
        elif ".original_module." not in name:  # the frozen twin of a module to save, which `bias="all"` sweeps up
            if parameter in replacements and not same_values(replacements[parameter], tensor):
                problems.append(f"{key}: the file holds two different values of {parameter}")
            replacements[parameter] = tensor
    return SortedTensors(parts, replacements, problems)


def _with_whole_tables(
    state: Mapping[str, Tensor], config: Mapping[str, Any], problems: list[str]
) -> Mapping[str, Tensor]:
    """The state with the table that it holds of an embedding, its trained rows put in, in their place
    (`trainable_token_indices`)."""
    asked, whole = config.get("trainable_token_indices"), dict(state)
    for key in [key for key in state if key.endswith(_TOKENS)]:
        module, rows = key.removesuffix(_TOKENS), whole.pop(key)
        table = whole.pop(f"{module}{_TABLE}", None)
        ids = _ids_of(asked, module)
        if table is None:
            problems.append(
                f"{key}: these rows belong into a table that the file lacks; save with save_embedding_layers=True, or"
                " merge with merge_and_unload()"
            )
        elif table.ndim != 2 or rows.shape != (len(ids), table.shape[1]) or not _are_in(ids, table):
            problems.append(f"{key}: its rows are not those of trainable_token_indices, or not of the table's size")
        else:
            whole[f"{module}.weight"] = table.index_copy(0, torch.tensor(ids), rows.to(table.dtype))
    return whole


def _ids_of(asked: Any, module: str) -> list[int]:
    if isinstance(asked, dict):
        asked = next((ids for name, ids in asked.items() if f".{module}".endswith(f".{name}")), None)
    return asked if isinstance(asked, list) and all(type(i) is int for i in asked) else []


def _are_in(ids: list[int], table: Tensor) -> bool:
    return all(0 <= i < len(table) for i in ids)


def plain_name(name: str) -> str:
    """The parameter's name in the bare model: without the names of PEFT's wrappers."""
    return re.sub(r"\.(base_layer|modules_to_save|original_module)(?=\.)", "", name)


def is_replacement(parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config may hold this parameter whole; PEFT saves embeddings without listing them."""
    module, _, leaf = parameter.rpartition(".")
    if parameter in (config.get("parameters_to_save") or ()) or (leaf == "bias" and config["bias"] != "none"):
        return True
    if leaf in ("weight", "bias") and module.rpartition(".")[2] in EMBEDDINGS:
        return True
    return in_saved_module(parameter, config["modules_to_save"])


def in_saved_module(parameter: str, modules: Collection[str]) -> bool:
    """Whether the parameter belongs to a module whose name ends in one of these, as PEFT finds and saves them."""
    parts = parameter.split(".")[:-1]
    return any(".".join(parts[: n + 1]).endswith(tuple(modules)) for n in range(len(parts)))


def write_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter folder.

    Raises:
        FormatError: a tensor is of a kind that the file cannot hold.
    """
    write_safetensors(state, folder / SAFETENSORS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
