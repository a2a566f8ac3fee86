"""What the adapter folders of PEFT share, whatever the method: files, fields, how keys name tensors, how to write them.

adapter_config.json          the fields of `fields.py`, and those of the method
adapter_model.safetensors    or adapter_model.bin:
    base_model.model.<module><suffix>               the block of an adapted module
    base_model.model.<module>[.base_layer].bias     a trained bias
    base_model.model.<parameter>                    a parameter of a module to save
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import fields
from flashbone.files.adapter import Adapter, same_values
from flashbone.files.sources import read_json
from flashbone.files.states import write_safetensors

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
ROOT = "base_model.model."
# PEFT saves embeddings along with the adapter when they are targeted or were resized, listed nowhere.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")
_KNOWN = ("peft_type", "peft_version")
_FIRST_NAMED = 5


@dataclass(frozen=True)
class Method:
    """How one method of PEFT lays out its folders.

    Attributes:
        kind: its peft_type.
        prefix: before `_block` and `_only`.
        dropout: the field of its dropout.
        checks: its own fields.
        defaults: what a field is where the config lacks it, or says null.
    """

    kind: str
    prefix: str
    dropout: str
    checks: dict[str, fields.Check]
    defaults: dict[str, Any]

    @property
    def block(self) -> str:
        return f".{self.prefix}_block"


def read_config(folder: Path, method: Method) -> dict[str, Any]:
    """The checked config of an adapter folder, with defaults for what it lacks.

    Raises:
        FormatError: there is none, it is of another method, or fields are bad; all are named.
    """
    file = folder / CONFIG
    if not folder.is_dir():
        what = "is a file, wanted the adapter's folder" if folder.exists() else "no such adapter folder"
        raise FormatError(f"{folder}: {what}")
    if not file.is_file():
        raise FormatError(f"{folder}: this folder is no adapter, it has no {CONFIG}")
    config = read_json(file)
    kind = config.get("peft_type")
    if kind != method.kind:
        raise FormatError(f"{file}: this is a {fields.shown(kind)} adapter, wanted {method.kind}")
    return checked(file, config, method)


def checked(file: Path, config: dict[str, Any], method: Method) -> dict[str, Any]:
    """The config with defaults, once every field has been checked."""
    defaults = {"modules_to_save": [], "inference_mode": False} | method.defaults
    filled = config | {name: copy(value) for name, value in defaults.items() if config.get(name) is None}
    fields.check(file, filled, method.checks | fields.SHARED, _KNOWN)
    return filled


def weights_file(folder: Path) -> Path:
    """The file of an adapter folder that holds its tensors.

    Raises:
        FormatError: there is none.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise FormatError(f"{folder}: this adapter has no weights, wanted {SAFETENSORS} or {PICKLE}")


@dataclass(frozen=True)
class Sorted:
    """The tensors of a folder: blocks and replacements as in an `Adapter`, and what is wrong with the keys."""

    blocks: dict[str, Tensor]
    replacements: dict[str, Tensor]
    transposed: frozenset[str]
    problems: list[str]


def sort_keys(state: Mapping[str, Tensor], config: dict[str, Any], block: str, transposed_block: str = "") -> Sorted:
    """Sort the tensors of a folder by what their keys say; nothing is refused here.

    Args:
        state: The tensors.
        config: The checked config.
        block: How the keys of blocks end.
        transposed_block: The same where the weight is stored as (in, out).
    """
    blocks, replacements, transposed, problems = {}, {}, set(), []
    suffixes = (block, transposed_block) if transposed_block else (block,)
    for key, tensor in state.items():
        name = key.removeprefix(ROOT)
        suffix = next((s for s in suffixes if name.endswith(s)), "")
        module, is_block = name.removesuffix(suffix), bool(suffix)
        parameter = plain_name(name)
        if name == key or not (is_block or is_replacement(parameter, config)):
            problems.append(f"unknown key {key!r}")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: got {tensor.dtype}, wanted floating point numbers")
        elif module in blocks and is_block:
            problems.append(f"{key}: the file holds two blocks of {module}")
        elif is_block:
            blocks[module] = tensor
            transposed |= {module} if suffix == transposed_block else set()
        elif ".original_module." not in name:  # the frozen twin of a module to save, which `bias="all"` sweeps up
            if parameter in replacements and not same_values(replacements[parameter], tensor):
                problems.append(f"{key}: the file holds two different values of {parameter}")
            replacements[parameter] = tensor
    return Sorted(blocks, replacements, frozenset(transposed), problems)


def plain_name(name: str) -> str:
    """The parameter's name in the bare model: without the names of PEFT's wrappers."""
    return re.sub(r"\.(base_layer|modules_to_save|original_module)(?=\.)", "", name)


def is_replacement(parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether the config, or PEFT's habits with embeddings, say that a folder may hold this parameter whole."""
    module, _, leaf = parameter.rpartition(".")
    if parameter in config.get("parameters_to_save", ()) or (leaf == "bias" and config["bias"] != "none"):
        return True
    if leaf in ("weight", "bias") and module.rpartition(".")[2] in EMBEDDINGS:
        return True
    parts = module.split(".")
    prefixes = (".".join(parts[: n + 1]) for n in range(len(parts)))
    # PEFT wraps every module whose name ends in an entry, and saves all that is inside.
    return bool(module) and any(p.endswith(tuple(config["modules_to_save"])) for p in prefixes)


def block_problems(
    where: str, block: Tensor, variant: variants.Variant, r: int, mini_r: int, stacked: bool
) -> list[str]:
    """What contradicts the config in the shape of a block; `stacked`: there may be one for each expert."""
    wanted = variants.dimensions(variant)
    shape = tuple(block.shape)
    stacked = stacked and block.ndim == wanted + 1
    if block.ndim != wanted + stacked or not all(shape):
        return [f"{where}: got shape {shape}, a {variant.name} block has {wanted} axes, none of them empty"]
    problems = []
    if shape[-2] != r or (wanted == 3 and shape[-1] != r):
        problems.append(f"{where}: got shape {shape}, but {CONFIG} says r={r}")
    if variant.name == "mini" and shape[-1] != mini_r:
        problems.append(f"{where}: got shape {shape}, but {CONFIG} says mini_r={mini_r}")
    return problems


def sizes(adapter: Adapter) -> tuple[int, dict[str, int]]:
    """The most common block size, and the others by name."""
    own = {name: block.shape[-2] for name, block in adapter.blocks.items()}
    r = Counter(own.values()).most_common(1)[0][0]
    return r, {name: size for name, size in own.items() if size != r}


def mini_r(adapter: Adapter, where: str) -> int:
    """The columns of the blocks of `mini`, 1 for other variants.

    Raises:
        FormatError: they differ, for which there is no field.
    """
    found = {block.shape[-1] for block in adapter.blocks.values()} if adapter.variant.name == "mini" else {1}
    if len(found) > 1:
        raise FormatError(
            f"{where}: its blocks have {_some(map(str, sorted(found)))} columns, and mini_r is one number"
        )
    return found.pop()


def shared_config(adapter: Adapter, method: Method) -> dict[str, Any]:
    """A config with the fields that say where the adapter goes and what is saved whole: the source's as far as they
    mean these tensors, else the names in full."""
    old = adapter.config
    config = dict.fromkeys(fields.SHARED) | {"inference_mode": True, "modules_to_save": []}
    config |= {name: old[name] for name in fields.SHARED if name in old}
    modules = [name for name in adapter.blocks if name not in adapter.parameters]
    targets = config["target_modules"]
    if targets is None or not all(fields.is_targeted(name, targets) for name in modules):
        config["target_modules"] = sorted(modules) or None
        config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    dropout = next((old[name] for name in ("dropout", "miss_dropout") if name in old), 0.0)
    config |= {"peft_type": method.kind, "base_model_name_or_path": adapter.base_model, method.dropout: dropout}
    config |= {"bias": old.get("bias", "none"), "parameters_to_save": list(old.get("parameters_to_save", ()))}
    _list_replacements(adapter, config, method)
    return config


def _list_replacements(adapter: Adapter, config: dict[str, Any], method: Method) -> None:
    """Fill in bias, modules_to_save and parameters_to_save so that they name all that the adapter holds whole."""
    saved: list[str] = list(config["modules_to_save"] or ())
    biases: list[str] = []
    single = config["parameters_to_save"]
    for parameter in adapter.replacements:
        module, _, leaf = parameter.rpartition(".")
        if is_replacement(parameter, {"bias": "none", "modules_to_save": saved, "parameters_to_save": single}):
            continue
        if leaf == "bias" and f"{module}.weight" not in adapter.replacements:
            biases.append(module)
        elif module and leaf in ("weight", "bias") and not _would_exclude(module, adapter):
            saved.append(module)
        else:
            single.append(parameter)
    only = f"{method.prefix}_only"
    asked = config["bias"] if config["bias"] in ("none", "all") else only
    if any(_wrappers(module, adapter) == 0 for module in biases):
        asked = "all"
    elif biases and asked == "none":
        asked = only
    config |= {"bias": asked, "modules_to_save": saved or None}


def _would_exclude(module: str, adapter: Adapter) -> bool:
    """Whether PEFT would find a block's layer, too, if this module were one to save."""
    return any(f".{module}." in f".{name}." or name.endswith(module) for name in adapter.blocks)


def _wrappers(module: str, adapter: Adapter) -> int:
    """How many layers of the adapter stand around a module in the live model."""
    own = module in adapter.blocks and module not in adapter.parameters
    return own + sum(name.rpartition(".")[0] == module for name in adapter.parameters)


def state_of(adapter: Adapter, block: str, transposed_block: str = "") -> dict[str, Tensor]:
    """The tensors under the keys that the live model knows."""
    state = {}
    for name, tensor in adapter.blocks.items():
        state[f"{ROOT}{name}{transposed_block if name in adapter.transposed else block}"] = tensor
    for parameter, value in adapter.replacements.items():
        state[f"{ROOT}{_live_name(parameter, adapter)}"] = value
    return state


def _live_name(parameter: str, adapter: Adapter) -> str:
    """The name of a parameter in the live model, whose adapted modules are inside others."""
    parts, found = parameter.split("."), []
    for n, part in enumerate(parts, 1):
        found += [part, *["base_layer"] * _wrappers(".".join(parts[:n]), adapter)]
    return ".".join(found)


def write_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter folder.

    Raises:
        FormatError: a tensor is of a kind that the file cannot hold.
    """
    write_safetensors(state, folder / SAFETENSORS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def refuse(adapter: Adapter, reasons: Mapping[str, Any], what: str) -> None:
    """Refuse what a format cannot express.

    Args:
        adapter: That is to be written.
        reasons: Why, each with what it is about: names, or True.
        what: The format.

    Raises:
        FormatError: some reason holds.
    """
    found = [why if about is True else f"{why} ({_some(about)})" for why, about in reasons.items() if about]
    if found:
        raise FormatError(f"this {adapter.variant.name} adapter cannot be written as {what}: {'; '.join(found)}")


def _some(names: Any) -> str:
    names = list(names)
    rest = len(names) - _FIRST_NAMED
    return ", ".join(names[:_FIRST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
