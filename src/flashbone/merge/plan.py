"""What becomes of each tensor of the base that adapters change; nothing but headers is read, as long as none of them
holds a value for a tensor that is also changed otherwise."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import names, pth
from flashbone.files.adapter import Adapter, same_values
from flashbone.files.base import BaseModel
from flashbone.files.placing import IN_PYTHON, Place, place
from flashbone.variants.merged import Term
from flashbone.variants.stacked import PerExpert

LARGEST_WEIGHT = torch.finfo(torch.float32).max
ONE_BY_ONE = "merge one adapter, then the other into the result, or leave one out"


class Weighted(NamedTuple):
    """An adapter, what errors call it, and by how much its change is multiplied."""

    adapter: Adapter
    who: str
    weight: float


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor.

    Attributes:
        tensor: its name.
        terms: blocks that are merged into it.
        value: a value, and how far the tensor is moved to it first; 1 is all the way.
        transposed: whether it is stored as (in, out).
        stacked: whether it is one matrix for each expert.
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
        """The stored tensor as matrices (out, in), one or one for each expert; a view."""
        W = stored if self.stacked else stored.flatten(1)
        return W.mT if self.transposed else W


def checked_weights(weights: Sequence[float] | None, adapters: int) -> list[float]:
    """A weight for each adapter.

    Raises:
        ConfigError: their number or one of them is wrong.
    """
    if not adapters:
        raise ConfigError("adapters: none was given, wanted one or more")
    try:
        found = [1.0] * adapters if weights is None else [float(w) for w in weights]
    except OverflowError:  # of an int
        found = [math.inf] * len(weights or ())
    if len(found) != adapters:
        raise ConfigError(f"weights: got {len(found)} for {adapters} adapters, wanted one for each")
    if not all(abs(weight) <= LARGEST_WEIGHT for weight in found):  # NaN is not
        raise ConfigError(f"weights: got {found}, wanted numbers of float32 that are neither NaN nor infinite")
    return found


def plan(
    model: BaseModel, adapters: Sequence[Weighted], is_base_value: Callable[[str, Tensor], bool]
) -> dict[str, Edit]:
    """Decide for every tensor that changes what becomes of it.

    Args:
        model: The base.
        adapters: What to merge.
        is_base_value: Whether a value is that of the base's tensor of this name, so that it changes nothing.

    Raises:
        FormatError: names of an adapter that the base has not, or not clearly, or that contradict another adapter;
            all are listed.
        ShapeError: sizes that do not fit; all are listed.
    """
    found: dict[str, list[tuple[Place, Weighted]]] = {}
    for one in adapters:
        replacements, problems = _without_tied_copies(model, one.adapter)
        try:
            places = place(model, dataclasses.replace(one.adapter, replacements=replacements), problems)
        except FlashboneError as error:
            raise error if len(adapters) == 1 else type(error)(f"{one.who}: {error}") from None
        for where in places:
            found.setdefault(where.tensor, []).append((where, one))
    edits, problems = {}, []
    for tensor, changes in found.items():
        try:
            edits[tensor] = _edit(tensor, changes, is_base_value)
        except FormatError as error:
            problems.append(str(error))
    tied = pth.tied(model.files[0]) if model.is_pth else {}
    for name, other in tied.items():
        if name in edits or other in edits:
            problems.append(
                f"{name} is tied to {other}, so that changing one would change both; save the model again with a copy"
                " of the tensor under each name"
            )
    if problems:
        raise FormatError("; ".join(problems))
    return {tensor: edit for tensor, edit in edits.items() if edit.terms or edit.value is not None}


def _edit(tensor: str, changes: list[tuple[Place, Weighted]], is_base_value: Callable[[str, Tensor], bool]) -> Edit:
    layouts = {(p.transposed, p.stacked) for p, _ in changes if p.block is not None}
    if len(layouts) > 1:
        who = " and ".join(one.who for _, one in changes)
        raise FormatError(f"{tensor}: {who} disagree on whether it is stored transposed; are they of one model?")
    transposed, stacked = layouts.pop() if layouts else (False, False)
    terms = tuple(
        (PerExpert(one.adapter.variant, p.shape[0]) if stacked else one.adapter.variant, p.block, one.weight)
        for p, one in changes
        if p.block is not None
    )
    values = [(p.replacement, one) for p, one in changes if p.replacement is not None]
    if len(values) + len(terms) > 1:  # saved along with an adapter, unchanged: embeddings
        values = [(value, one) for value, one in values if not is_base_value(tensor, value)]
    if not values:
        return Edit(tensor, terms, None, transposed, stacked)
    value, first = values[0]
    if terms and (len(changes) > 1 or first.weight != 1):
        others = ", ".join(one.who for p, one in changes if p.block is not None)
        way_out = ONE_BY_ONE if len(changes) > 1 else "merge it with weight 1"
        raise FormatError(f"{tensor}: {first.who} holds a value for it, and {others} a block; {way_out}")
    if any(not same_values(value, other) or one.weight != first.weight for other, one in values[1:]):
        who = " and ".join(one.who for _, one in values)
        raise FormatError(f"{tensor}: {who} hold values for it that differ in value or weight; {ONE_BY_ONE}")
    return Edit(tensor, terms, (value, first.weight), transposed, stacked)


def _without_tied_copies(model: BaseModel, adapter: Adapter) -> tuple[dict[str, Tensor], list[str]]:
    """The replacements that the checkpoint has room for, and what cannot be done to embeddings that are tied: the
    input and the output embedding are one tensor there, while the adapter makes them differ."""
    replacements, problems = dict(adapter.replacements), []
    if not names.has_tied_embeddings(model.config, model.entries):
        return replacements, problems
    heads = [p for p in replacements if names.is_embedding(p, names.OUTPUT_EMBEDDINGS)]
    inputs = [p for p in replacements if names.is_embedding(p, names.INPUT_EMBEDDINGS)]
    ends = (*names.OUTPUT_EMBEDDINGS, *names.INPUT_EMBEDDINGS)
    touched = [m for m in adapter.blocks if names.is_embedding(adapter.parameter(m), ends)]
    agree = len(heads) == len(inputs) == 1 and same_values(replacements[heads[0]], replacements[inputs[0]])
    if agree and not touched:
        if heads[0] not in model.entries:
            del replacements[heads[0]]
        return replacements, problems
    for name in dict.fromkeys([*touched, *heads, *inputs]):
        problems.append(
            f"{name}: the base ties its output embedding to the input embedding (tie_word_embeddings), so changing one"
            f" would change both; {IN_PYTHON}, with tie_word_embeddings=False"
        )
        replacements.pop(name, None)
    return replacements, problems
