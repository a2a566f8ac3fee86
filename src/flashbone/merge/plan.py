"""What becomes of each tensor of the base that adapters change, decided before anything is written.

Only headers are read, and those values of the base that an adapter also holds.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import names, placing, pth, reading
from flashbone.files.adapter import Adapter, same_values
from flashbone.files.base import BaseModel
from flashbone.variants.merged import Term
from flashbone.variants.stacked import PerExpert

_ONE_BY_ONE = "merge one adapter, then the other into the result, or leave one out"


class WeightedAdapter(NamedTuple):
    """An adapter, its path, and the factor of its change."""

    adapter: Adapter
    path: Path
    weight: float


@dataclass(frozen=True)
class TensorEdit:
    """What becomes of one tensor.

    Attributes:
        tensor: its name.
        terms: blocks that are merged into it.
        value: a value that replaces it first, with a weight: 1 replaces it whole, 0.5 moves it half of the way.
        transposed: whether it is stored as (in, out).
        stacked: whether it holds one matrix for each expert.
    """

    tensor: str
    terms: tuple[Term, ...] = ()
    value: tuple[Tensor, float] | None = None
    transposed: bool = False
    stacked: bool = False

    @property
    def change(self) -> str:
        """In words, for merge.json."""
        return " and ".join(["replaced"] * (self.value is not None) + ["merged"] * bool(self.terms))

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored tensor as a matrix (out, in), or one for each expert; a view."""
        W = stored if self.stacked else stored.flatten(1)
        return W.mT if self.transposed else W


def read_adapters(paths: Sequence[str | Path], weights: Sequence[float] | None) -> list[WeightedAdapter]:
    """Read adapters of any format; `weights` are 1 unless given.

    Raises:
        ConfigError: the number of weights or one of them is wrong.
        FormatError: an adapter is broken, or of another method.
    """
    if not paths:
        raise ConfigError("adapters: got none, wanted one or more")
    try:
        factors = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    except OverflowError:  # of an int
        factors = [math.inf] * len(weights or ())
    if len(factors) != len(paths):
        raise ConfigError(f"weights: got {len(factors)} for {len(paths)} adapters, wanted one for each")
    if not all(abs(factor) <= torch.finfo(torch.float32).max for factor in factors):  # NaN is not
        raise ConfigError(f"weights: got {factors}, wanted finite numbers in the range of float32")
    return [
        WeightedAdapter(reading.read_adapter(Path(path)), Path(path), factor)
        for path, factor in zip(paths, factors, strict=True)
    ]


def plan_edits(model: BaseModel, adapters: Sequence[WeightedAdapter]) -> dict[str, TensorEdit]:
    """Decide for every tensor that changes what becomes of it.

    Raises:
        FormatError: names of an adapter that the base lacks, that are ambiguous, or that contradict another adapter;
            all are listed.
        ShapeError: sizes that do not fit; all are listed.
    """
    changes: dict[str, list[tuple[placing.PlacedTensor, WeightedAdapter]]] = {}
    for weighted in adapters:
        replacements, problems = _without_tied_copies(model, weighted.adapter)
        try:
            places = placing.place(model, dataclasses.replace(weighted.adapter, replacements=replacements), problems)
        except FlashboneError as error:
            raise error if len(adapters) == 1 else type(error)(f"{weighted.path}: {error}") from None
        for place in places:
            changes.setdefault(place.tensor, []).append((place, weighted))
    edits, problems = {}, []
    for tensor, tensor_changes in changes.items():
        try:
            edits[tensor] = _edit(model, tensor, tensor_changes)
        except FormatError as error:
            problems.append(str(error))
    for name, other in (pth.tied(model.files[0]) if model.is_pth else {}).items():
        if name in edits or other in edits:
            problems.append(
                f"{name} is tied to {other}, so changing one would change both; save the model again with a copy of the"
                " tensor under each name"
            )
    if problems:
        raise FormatError("; ".join(problems))
    return {tensor: edit for tensor, edit in edits.items() if edit.terms or edit.value is not None}


def _edit(model: BaseModel, tensor: str, changes: list[tuple[placing.PlacedTensor, WeightedAdapter]]) -> TensorEdit:
    shifts = [(place, weighted) for place, weighted in changes if place.block is not None]
    layouts = {(place.transposed, place.stacked) for place, _ in shifts}
    if len(layouts) > 1:
        raise FormatError(f"{tensor}: {_paths(changes)} disagree on its orientation; are they for the same model?")
    transposed, stacked = layouts.pop() if layouts else (False, False)
    terms = []
    for place, (adapter, _, weight) in shifts:
        assert place.block is not None
        variant = PerExpert(adapter.variant, place.shape[0]) if stacked else adapter.variant
        terms.append((variant, place.block, weight))
    values = [(place.replacement, weighted) for place, weighted in changes if place.replacement is not None]
    if len(values) + len(terms) > 1:  # an adapter may hold unchanged values of the base: saved embeddings
        values = [(value, weighted) for value, weighted in values if not _is_base_value(model, tensor, value)]
    if not values:
        return TensorEdit(tensor, tuple(terms), None, transposed, stacked)
    value, first = values[0]
    if terms and (len(changes) > 1 or first.weight != 1):
        remedy = _ONE_BY_ONE if len(changes) > 1 else "merge it with weight 1"
        raise FormatError(f"{tensor}: {first.path} holds a value for it, and {_paths(shifts)} a block; {remedy}")
    if first.weight != 1 and value.shape != changes[0][0].shape:
        raise FormatError(
            f"{tensor}: {first.path} has more rows of it than the base, which a weight cannot scale; use 1"
        )
    if any(not same_values(value, other) or weighted.weight != first.weight for other, weighted in values[1:]):
        raise FormatError(
            f"{tensor}: {_paths(values)} hold values for it that differ in value or weight; {_ONE_BY_ONE}"
        )
    return TensorEdit(tensor, tuple(terms), (value, first.weight), transposed, stacked)


def _paths(changes: Sequence[tuple[object, WeightedAdapter]]) -> str:
    return " and ".join(str(weighted.path) for _, weighted in changes)


def _is_base_value(model: BaseModel, tensor: str, value: Tensor) -> bool:
    stored = model.tensor(tensor)
    wide = torch.promote_types(stored.dtype, value.dtype)
    return stored.shape == value.shape and torch.equal(stored.to(wide), value.to(wide))


def _without_tied_copies(model: BaseModel, adapter: Adapter) -> tuple[dict[str, Tensor], list[str]]:
    """The replacements that the checkpoint has room for, and why tied embeddings cannot be changed: the checkpoint has
    one tensor for the input and the output embedding, and the adapter makes them differ."""
    replacements, problems = dict(adapter.replacements), []
    if not names.has_tied_embeddings(model.config, model.entries):
        return replacements, problems
    heads = [name for name in replacements if names.is_embedding(name, names.OUTPUT_EMBEDDINGS)]
    inputs = [name for name in replacements if names.is_embedding(name, names.INPUT_EMBEDDINGS)]
    ends = (*names.OUTPUT_EMBEDDINGS, *names.INPUT_EMBEDDINGS)
    shifted = [module for module in adapter.blocks if names.is_embedding(adapter.parameter(module), ends)]
    agree = len(heads) == len(inputs) == 1 and same_values(replacements[heads[0]], replacements[inputs[0]])
    if agree and not shifted:
        if heads[0] not in model.entries:
            del replacements[heads[0]]
        return replacements, problems
    for name in dict.fromkeys([*shifted, *heads, *inputs]):
        problems.append(
            f"{name}: the base ties its output embedding to the input embedding (tie_word_embeddings), so changing one"
            f" would change both; {placing.IN_PYTHON}, with tie_word_embeddings=False"
        )
        replacements.pop(name, None)
    return replacements, problems
