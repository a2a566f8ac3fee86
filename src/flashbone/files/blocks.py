"""Adapter folders of PEFT's methods that hold blocks, BONE and MISS: read into an `Adapter`, and written from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError, shortened
from flashbone.files import fields, folders
from flashbone.files.adapter import Adapter, is_same
from flashbone.files.states import read_state

_FIRST_NAMED = 5


class BlockFolder(ABC):
    """The folders of one method of PEFT.

    Attributes:
        method: its peft_type.
        bias_only: its word for the biases of adapted layers.
        dropout: the field of its dropout.
        schema: the fields of its config.
        block: how the keys of blocks end.
        transposed_block: the same where the weight is stored as (in, out); empty: the method has no such layers.
    """

    method: str
    bias_only: str
    dropout: str
    schema: fields.Schema
    block: str
    transposed_block = ""

    @abstractmethod
    def variant(self, file: Path, config: dict[str, Any]) -> variants.Variant:
        """The variant that a checked config means."""

    @abstractmethod
    def fill(self, adapter: Adapter, config: dict[str, Any]) -> None:
        """Set the method's own fields in a config that is to be written.

        Raises:
            FormatError: the method cannot hold this adapter; all reasons are named.
        """

    def read(self, path: str | Path) -> Adapter:
        """Read an adapter folder whole; tensors are on the CPU, in the file's dtypes.

        Raises:
            FormatError: something is missing, broken or unknown; all bad fields, or all bad keys, are named at once.
        """
        folder = Path(path)
        file = folder / folders.CONFIG
        config = fields.checked(file, folders.read_config(folder, self.method), self.schema)
        variant = self.variant(file, config)
        weights = folders.weights_file(folder)
        return self._adapter(weights, read_state(weights), config, variant)

    def write(self, adapter: Adapter, folder: Path) -> None:
        """Write the folder of an adapter, such that `read` gives the adapter back, and PEFT loads it.

        Raises:
            FormatError: the method cannot hold this adapter; all reasons are named, and nothing is written.
        """
        config, state = self.config(adapter), self._state(adapter)
        where = Path(f"{self.method} folder")
        checked = fields.checked(where, config, self.schema)
        again = self._adapter(where, state, checked, self.variant(where, checked))
        if not is_same(replace(again, config=adapter.config), adapter):
            raise FormatError(
                f"names of this adapter would mean something else in a {self.method} folder; rename its layers"
            )
        folders.write_folder(folder, config, state)

    def _adapter(
        self, file: Path, state: dict[str, Tensor], config: dict[str, Any], variant: variants.Variant
    ) -> Adapter:
        """The adapter that a file with these keys and this config holds."""
        suffixes = (self.block, self.transposed_block) if self.transposed_block else (self.block,)
        parts, replacements, problems = folders.sort_tensors(state, config, suffixes)
        named = frozenset(config.get("target_parameters") or ())
        parameters = frozenset(name for name in parts if fields.is_targeted(name, named))
        blocks = {}
        for name, (block, *others) in ((name, part.values()) for name, part in parts.items()):
            blocks[name] = block
            problems += [f"{name}: the file holds two blocks of it"] if others else []
            r = fields.by_pattern(name, config.get("rank_pattern") or {}, config["r"])
            problems += _problems(f"{name}{self.block}", block, variant, r, config["mini_r"], name in parameters)
        if not blocks and not problems:
            problems.append(f"it holds no {self.block[1:]}")
        if problems:
            raise FormatError(f"{file}: {'; '.join(problems)}")
        base = config.get("base_model_name_or_path") or None
        transposed = frozenset(name for name, part in parts.items() if self.transposed_block in part)
        return Adapter(variant, blocks, replacements, config, base, transposed, parameters)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """The config to be written. It keeps the source's fields where they still fit these tensors, and lists names in
        full where they do not."""
        old = adapter.config
        shared = {name: old[name] for name in fields.SHARED if name in old}
        config: dict[str, Any] = fields.defaults(self.schema) | {"inference_mode": True} | shared
        if old.get("peft_type") == self.method:
            config |= old
        modules = [name for name in adapter.blocks if name not in adapter.parameters]
        targets = config["target_modules"]
        targets = frozenset(targets) if isinstance(targets, list) else targets
        if targets is None or not all(fields.is_targeted(name, targets) for name in modules):
            config["target_modules"] = sorted(modules) or None
            config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config |= {"peft_type": self.method, "base_model_name_or_path": adapter.base_model}
        config[self.dropout] = next((old[name] for name in ("dropout", "miss_dropout") if name in old), 0.0)
        self._list_replacements(adapter, config)
        self.fill(adapter, config)
        return config

    def _list_replacements(self, adapter: Adapter, config: dict[str, Any]) -> None:
        """Set bias, modules_to_save and parameters_to_save so that they name all that the adapter holds whole."""
        saved: list[str] = list(config["modules_to_save"] or ())
        single: list[str] = list(adapter.config.get("parameters_to_save") or ())
        biases: list[str] = []
        for parameter in adapter.replacements:
            module, _, leaf = parameter.rpartition(".")
            listed = {"bias": "none", "modules_to_save": saved, "parameters_to_save": single}
            if folders.is_replacement(parameter, listed):
                continue
            if leaf == "bias" and f"{module}.weight" not in adapter.replacements:
                biases.append(module)
            elif module and leaf in ("weight", "bias") and not _would_exclude(module, adapter):
                saved.append(module)
            else:
                single.append(parameter)
        bias = adapter.config.get("bias", "none")
        bias = bias if bias in ("none", "all") else self.bias_only
        if any(_wrappers(module, adapter) == 0 for module in biases):
            bias = "all"
        elif biases and bias == "none":
            bias = self.bias_only
        config |= {"bias": bias, "modules_to_save": saved or None, "parameters_to_save": single or None}

    def _state(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors under the keys that the live model knows."""
        state = {}
        for name, tensor in adapter.blocks.items():
            suffix = self.transposed_block if name in adapter.transposed else self.block
            state[f"{folders.ROOT}{name}{suffix}"] = tensor
        for parameter, value in adapter.replacements.items():
            state[f"{folders.ROOT}{_live_name(parameter, adapter)}"] = value
        return state


def _problems(where: str, block: Tensor, variant: variants.Variant, r: int, mini_r: int, stacked: bool) -> list[str]:
    """What contradicts the config in the shape of a block; `stacked`: it may be one for each expert."""
    wanted = variants.dimensions(variant)
    shape = tuple(block.shape)
    stacked = stacked and block.ndim == wanted + 1
    if block.ndim != wanted + stacked or not all(shape):
        return [f"{where}: got shape {shape}, a {variant.name} block has {wanted} axes, none of them empty"]
    problems = []
    if shape[-2] != r or (wanted == 3 and shape[-1] != r):
        problems.append(f"{where}: got shape {shape}, but {folders.CONFIG} says r={r}")
    if variant.block_fields(block).get("mini_r", mini_r) != mini_r:
        problems.append(f"{where}: got shape {shape}, but {folders.CONFIG} says mini_r={mini_r}")
    return problems


def block_sizes(adapter: Adapter) -> tuple[int, dict[str, int]]:
    """The most common block size, and the others by name."""
    sizes = {name: block.shape[-2] for name, block in adapter.blocks.items()}
    r = Counter(sizes.values()).most_common(1)[0][0]
    return r, {name: size for name, size in sizes.items() if size != r}


def mini_r(adapter: Adapter, where: str) -> int:
    """The field mini_r of the blocks, 1 for variants without one.

    Raises:
        FormatError: they differ, and the config has one field for all.
    """
    widths = {adapter.variant.block_fields(block).get("mini_r", 1) for block in adapter.blocks.values()}
    if len(widths) > 1:
        raise FormatError(
            f"{where}: its blocks have {shortened(sorted(widths), _FIRST_NAMED)} columns, and mini_r is one number"
        )
    return widths.pop()


def _would_exclude(module: str, adapter: Adapter) -> bool:
    """Whether PEFT would find a block's layer, too, if this module were one to save."""
    return any(f".{module}." in f".{name}." or name.endswith(module) for name in adapter.blocks)


def _wrappers(module: str, adapter: Adapter) -> int:
    """How many layers of the adapter are around a module in the live model."""
    is_adapted = module in adapter.blocks and module not in adapter.parameters
    return is_adapted + sum(name.rpartition(".")[0] == module for name in adapter.parameters)


def _live_name(parameter: str, adapter: Adapter) -> str:
    """The name of a parameter in the live model, whose adapted modules are inside others."""
    parts, live = parameter.split("."), []
    for n, part in enumerate(parts, 1):
        live += [part, *["base_layer"] * _wrappers(".".join(parts[:n]), adapter)]
    return ".".join(live)


def refuse(adapter: Adapter, reasons: Mapping[str, Any], what: str) -> None:
    """Refuse what a format cannot express.

    Args:
        adapter: That is to be written.
        reasons: Why, each with the names that it is about, or whether it holds.
        what: The format.

    Raises:
        FormatError: some reason holds.
    """
    problems = [
        why if about is True else f"{why} ({shortened(about, _FIRST_NAMED)})" for why, about in reasons.items() if about
    ]
    if problems:
        raise FormatError(f"this {adapter.variant.name} adapter cannot be written as {what}: {'; '.join(problems)}")
