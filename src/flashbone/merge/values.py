"""The arithmetic of a merge on disk: that of `flashbone.variants.merged_weight`, and of values that are replaced."""

import torch
from torch import Tensor

from flashbone.errors import NonFiniteError
from flashbone.merge.plan import Edit
from flashbone.variants import merged


def edited(edit: Edit, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The new value of a tensor, rounded once; `stored` may be overwritten.

    Raises:
        NonFiniteError: it would hold NaN or infinity.
    """
    if not edit.terms:
        return _replaced(edit, stored, dtype)
    if edit.value is not None:  # as the live model has it: loaded in the base's dtype, then merged into
        stored = _replaced(edit, stored, stored.dtype)
    result = stored if stored.dtype == dtype else torch.empty(stored.shape, dtype=dtype)
    merged.merged_weight(edit.matrix(stored), edit.terms, edit.tensor, True, edit.matrix(result))
    return result


def converted(tensor: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype.

    Raises:
        NonFiniteError: a number is beyond its range.
    """
    result = torch.empty(stored.shape, dtype=dtype)
    for old, new in zip(_chunks(stored), _chunks(result), strict=True):
        new.copy_(old)
        if (new.isinf() & old.isfinite()).any():
            raise NonFiniteError(
                f"{tensor}: it holds {float(old.abs().max()):.3g}, which is beyond the range of {dtype}, whose largest"
                f" number is {torch.finfo(dtype).max:.3g}; use another dtype"
            )
    return result


def _replaced(edit: Edit, stored: Tensor, dtype: torch.dtype) -> Tensor:
    assert edit.value is not None
    value, weight = edit.value
    if not all(chunk.isfinite().all() for chunk in _chunks(value)):
        raise NonFiniteError(f"{edit.tensor}: the adapter's value for it holds NaN or infinity; it is broken")
    if weight == 1:
        return converted(edit.tensor, value, dtype)
    wide = torch.promote_types(torch.promote_types(stored.dtype, value.dtype), torch.float32)
    result = stored if stored.dtype == dtype else torch.empty(stored.shape, dtype=dtype)
    for base, own, new in zip(_chunks(stored), _chunks(value), _chunks(result), strict=True):
        new.copy_(base.to(wide) + weight * (own.to(wide) - base.to(wide)))
        if not new.isfinite().all():
            raise NonFiniteError(f"{edit.tensor}: its value moved by {weight} would hold NaN or infinity")
    return result


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(merged.CHUNK) if tensor.numel() else ()
