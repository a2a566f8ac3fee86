"""Which tensors of a base model an adapter changes, in which orientation, and whether the sizes fit.

Only headers are read. Merging and conversion both start here, so that they refuse the same adapters in the same words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError, ShapeError
from flashbone.files import names, tensors
from flashbone.files.adapter import Adapter
from flashbone.files.base import BaseModel
from flashbone.variants.stacked import PerExpert

IN_PYTHON = (
    "merge in Python instead, on the model class that it was trained on:"
    " PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(OUT)"
)
_EMBEDDINGS = (*names.INPUT_EMBEDDINGS, *names.OUTPUT_EMBEDDINGS)


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the base that an adapter changes.

    Attributes:
        tensor: its name in the base.
        block: the block that shifts it, if any.
        replacement: the value that takes its place first, if any.
        transposed: whether it is kept as (in, out).
        stacked: whether it is one matrix for each expert. Any other tensor of more than two axes is a convolution's.
        shape: as it is stored.
        name: of the block in the adapter.
    """

    tensor: str
    block: Tensor | None = None
    replacement: Tensor | None = None
    transposed: bool = False
    stacked: bool = False
    shape: tuple[int, ...] = ()
    name: str = ""

    @property
    def grown(self) -> int:
        """The rows of an embedding that the adapter grew with the vocabulary; 0 for other replacements."""
        if self.replacement is None or self.block is not None or not names.is_embedding(self.tensor, _EMBEDDINGS):
            return 0
        rows, *others = self.replacement.shape
        return rows if rows > self.shape[0] and tuple(others) == self.shape[1:] else 0

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of the matrix that a block shifts; of one expert's, where they are stacked."""
        shape = self.shape[1:] if self.stacked else (self.shape[0], math.prod(self.shape[1:]))
        return (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])


def place(model: BaseModel, adapter: Adapter, problems: Sequence[str] = ()) -> list[PlacedTensor]:
    """Find the tensor of every block and replacement, and check that it fits.

    Args:
        model: The base.
        adapter: The adapter.
        problems: Other problems, named in the same error.

    Raises:
        FormatError: names of the adapter are missing from the base, or ambiguous; all are listed.
        ShapeError: sizes do not fit; all are listed.
    """
    problems = list(problems)
    blocks = {adapter.parameter(name): name for name in adapter.blocks}
    known_transposed = {adapter.parameter(name) for name in adapter.transposed}
    located, lost = names.locate([*blocks, *(p for p in adapter.replacements if p not in blocks)], model.entries)
    problems += [_lost(name, reason, name in blocks, name in adapter.parameters) for name, reason in lost.items()]
    problems += _shared_targets(located)
    places, misfits = [], []
    for parameter, tensor in located.items():
        name = blocks.get(parameter, "")
        block = adapter.blocks[name] if name else None
        is_parameter = parameter in adapter.parameters
        transposed = parameter in known_transposed
        if block is not None and not transposed and not is_parameter:
            transposed = names.is_transposed(tensor, model.config)
        if transposed is None:
            problems.append(
                f"{tensor}: whether it is stored transposed follows from model_type, which config.json lacks"
            )
        shape = model.entries[tensor].shape
        stacked = is_parameter and len(shape) == 3
        value = adapter.replacements.get(parameter)
        if value is not None and model.is_pth:
            value = shaped(value, shape)
        places.append(PlacedTensor(tensor, block, value, bool(transposed), stacked, shape, name or parameter))
        misfits += _misfits(places[-1], model.entries[tensor], adapter.variant)
    if rows := {placed.grown for placed in places} - {0}:
        grown = {placed.tensor for placed in places if placed.grown == max(rows)}
        kept = [name for name in model.entries if names.is_embedding(name, _EMBEDDINGS) and name not in grown]
        misfits += [f"{name}: the adapter does not grow it with the vocabulary, to {max(rows)} rows" for name in kept]
    if problems:
        raise FormatError(f"the adapter does not fit {model.folder}: {'; '.join(problems + misfits)}")
    if misfits:
        raise ShapeError(f"the adapter does not fit {model.folder}: {'; '.join(misfits)}")
    return places


def shaped(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A value in another shape, where they differ in axes of one only: RWKV's vectors come as (C,) and as (1, 1, C)."""
    same = [size for size in value.shape if size != 1] == [size for size in shape if size != 1]
    return value.reshape(shape) if same else value


def _lost(name: str, reason: str, is_block: bool, is_parameter: bool) -> str:
    tied = names.is_embedding(name, (*names.OUTPUT_EMBEDDINGS, *names.INPUT_EMBEDDINGS))
    hint = " (is it tied to another tensor?)" if tied else ""
    if is_parameter:
        return f"{name}: {reason}, which may keep every expert by itself (transformers fuses them); {IN_PYTHON}"
    if is_block:
        return f"{name}: {reason}{hint}; is it an adapter of another model?"
    return f"{name}: {reason}{hint}, but the adapter holds a value for it; {IN_PYTHON}"


def _shared_targets(located: dict[str, str]) -> list[str]:
    users: dict[str, list[str]] = {}
    for parameter, tensor in located.items():
        users.setdefault(tensor, []).append(parameter)
    return [f"{tensor}: {' and '.join(who)} both name it" for tensor, who in users.items() if len(who) > 1]


def _misfits(placed: PlacedTensor, entry: tensors.TensorEntry, variant: variants.Variant) -> list[str]:
    where, shape = placed.tensor, entry.shape
    if entry.dtype not in tensors.FLOATS:
        wanted = ", ".join(tensors.FLOATS)
        return [f"{where}: is stored as {entry.dtype}, wanted {wanted}; merge into the original unquantised model"]
    misfits = []
    if placed.replacement is not None and tuple(placed.replacement.shape) != shape and not placed.grown:
        got = tuple(placed.replacement.shape)
        misfits.append(f"{where}: the adapter's value has shape {got}, the base's {shape}; was it resized? {IN_PYTHON}")
    if placed.block is None:
        return misfits
    if len(shape) < 2 or (placed.transposed and not placed.stacked and len(shape) != 2):
        return [*misfits, f"{where}: shape {shape} is not that of a layer that can be adapted"]
    variant = PerExpert(variant, shape[0]) if placed.stacked else variant
    try:
        variants.check_block(where, variant, placed.block, *placed.matrix)
    except ShapeError as error:
        misfits.append(str(error))
    return misfits
