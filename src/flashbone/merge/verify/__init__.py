"""Whether a merged model does what its base and adapters do: both are loaded, and their outputs compared.

A merge into 16-bit files rounds, and what that does to the outputs depends on the model. It is measured: the unmerged
model is merged in memory in fp32, which must leave its outputs, then rounded as the files are, which the files must
equal. So the limit is that of fp32 arithmetic whatever the files hold, and no wrong merge hides behind the rounding.

RWKV normalises what each head returns, however small it is, so that some tokens of some models amplify fp32's own
errors beyond that limit. Such a model is run once more in fp64, with the same weights: the limit stays.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flashbone.errors import FormatError
from flashbone.files import names
from flashbone.files.base import BaseModel, open_base
from flashbone.files.tensors import FLOATS
from flashbone.merge.verify import running
from flashbone.merge.verify.adapters import Held, attach, read

# RMS of the outputs' error over their RMS. Right merges of SmolLM2-135M leave 1e-6 to 2e-6 in fp32; of new RWKV models
# of 12 and 24 layers, whose matrices were made as large as trained ones, 3e-6 to 4e-6.
LIMIT = 3e-5
_CLEARLY_WRONG = 100 * LIMIT


@dataclass(frozen=True)
class Verification:
    """What the comparison found. Errors are RMS errors of the outputs over the RMS of the unmerged model's.

    Attributes:
        tokens: that were run.
        dtype: of most numbers in the merged files.
        relative_error: of the merged model, to the unmerged one.
        rounding: what rounding to the files' dtypes explains of it.
        unexplained: what it does not.
        limit: that `unexplained` may reach.
        ok: whether it does not exceed it.
    """

    tokens: int
    dtype: str
    relative_error: float
    rounding: float
    unexplained: float
    limit: float
    ok: bool


def check_verifiable(base: str | Path, adapters: Sequence[str | Path], weights: Sequence[float] | None) -> None:
    """Refuse what `compare_logits` could never compare, before a merge spends its time on it.

    Raises:
        ConfigError, FormatError: as `compare_logits` does, but for what only loading the model can tell.
    """
    running.check_loadable(Path(base))
    read(adapters, weights)


def compare_logits(
    base: str | Path, adapters: Sequence[str | Path], weights: Sequence[float] | None, merged: str | Path
) -> Verification:
    """Compare a merged model with its base and adapters, unmerged, on random tokens, on the CPU in fp32 (fp64 where
    RWKV needs it).

    One of the two models is in memory at a time.

    Args:
        base: The base model's folder, or the `.pth` file of an RWKV-7 or RWKV-6 model.
        adapters: Adapters of the family, in any format that a merge takes; one may come twice.
        weights: How much of each went in; None: 1.
        merged: The merged model's folder or file.

    Raises:
        ConfigError: the arguments contradict each other, or more than one adapter brings values of its own.
        FormatError: what cannot be loaded or run, or adapters that do not fit the model's class.
    """
    base, merged = Path(base), Path(merged)
    held = read(adapters, weights)
    for path in (base, merged):
        running.check_loadable(path)
    found = _compare(base, held, merged, torch.float32)
    if running.amplifies_rounding(base) and LIMIT < found.unexplained <= _CLEARLY_WRONG:
        return _compare(base, held, merged, torch.float64)
    return found


def _compare(base: Path, held: Sequence[Held], merged: Path, dtype: torch.dtype) -> Verification:
    """Weights are merged in fp32, as those of the files were; models run in `dtype`."""
    files = open_base(merged)
    with running.quiet(), torch.no_grad():
        model, missing = running.load(base)
        rows = running.rows_for(model, base)
        attached = attach(model, held)
        unmerged = running.run(model, rows, base, dtype)
        attached.merge_and_unload()
        in_memory = running.run(model, rows, base, dtype)
        _round(model, files)
        rounded = running.run(model, rows, base, dtype)
        del model, attached
        model, missing_now = running.load(merged)
        if missing_now - missing:
            raise FormatError(f"{merged}: it lacks {', '.join(sorted(missing_now - missing))}, which the base has")
        got = running.run(model, rows, merged, dtype)
    unexplained = max(_error(in_memory, unmerged, unmerged), _error(got, rounded, unmerged))
    return Verification(
        tokens=sum(row.shape[1] for row in rows),
        dtype=str(_usual_dtype(files)).removeprefix("torch."),
        relative_error=_error(got, unmerged, unmerged),
        rounding=_error(rounded, in_memory, unmerged),
        unexplained=unexplained,
        limit=LIMIT,
        ok=unexplained <= LIMIT,
    )


def _round(model: nn.Module, files: BaseModel) -> None:
    """Round every parameter to the dtype that the files keep it in."""
    parameters = dict(model.named_parameters())
    found, _ = names.locate(parameters, files.entries)
    usual = _usual_dtype(files)
    for name, parameter in parameters.items():
        dtype = FLOATS.get(files.entries[found[name]].dtype) if name in found else usual
        if dtype is not None:
            parameter.copy_(parameter.to(dtype))


def _usual_dtype(files: BaseModel) -> torch.dtype:
    """That most numbers of the files have."""
    count: Counter[torch.dtype] = Counter()
    for entry in files.entries.values():
        if entry.dtype in FLOATS:
            count[FLOATS[entry.dtype]] += entry.end - entry.start
    return count.most_common(1)[0][0] if count else torch.float32


def _error(got: Tensor, want: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite where an output is not finite, or there are others."""
    if got.shape != want.shape:
        return math.inf
    error = float((got - want).square().mean().sqrt() / reference.square().mean().sqrt())
    return error if math.isfinite(error) else math.inf
