"""Whether a merged model does what its base and adapters do: both are loaded, and their outputs compared.

A merge into 16-bit files rounds, and how much that changes the outputs depends on the model. So it is measured: the
unmerged model is merged in memory in fp32, which must not change its outputs, then rounded as the files are, and must
then equal the files. The limit is that of fp32 arithmetic for files of any dtype, and rounding hides no wrong merge.

RWKV normalises what each head returns, however small it is, so some tokens of some models amplify fp32's own errors
beyond that limit. Such a model is run once more in fp64, with the same weights: the limit stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flashbone.errors import ConfigError, FormatError
from flashbone.files import names
from flashbone.files.base import BaseModel, open_base
from flashbone.files.beside import Beside, beside
from flashbone.files.tensors import FLOATS
from flashbone.merge.plan import WeightedAdapter, read_adapters
from flashbone.merge.verify import models

# RMS of the outputs' error over their RMS. Right merges of SmolLM2-135M leave 1e-6 to 2e-6 in fp32; of new RWKV models
# of 12 and 24 layers, whose matrices were made as large as trained ones, 3e-6 to 4e-6.
LIMIT = 3e-5
_CLEARLY_WRONG = 100 * LIMIT


@dataclass(frozen=True)
class Verification:
    """The outcome. Errors are RMS errors of the outputs over the RMS of the unmerged model's outputs.

    Attributes:
        tokens: number of tokens that were run.
        dtype: the one that takes most of the merged files' bytes.
        relative_error: between the merged and the unmerged model.
        rounding: the part of it that rounding to the files' dtypes explains.
        unexplained: the part that rounding does not explain.
        limit: the largest `unexplained` of a right merge.
        ok: whether `unexplained` is within the limit, and the answer the same.
        answer_tokens: how many tokens of an answer to a question in the chat template were compared, too; 0 for models
            without a template or a head for language, and for `.pth` files.
        same_answer: whether prompt and answer are the same, and the settings that answers are generated with.
    """

    tokens: int
    dtype: str
    relative_error: float
    rounding: float
    unexplained: float
    limit: float
    ok: bool
    answer_tokens: int = 0
    same_answer: bool = True


def check_verifiable(base: str | Path, adapters: Sequence[str | Path], weights: Sequence[float] | None) -> None:
    """Refuse what `compare_logits` cannot compare, before a merge spends its time on it.

    Raises:
        ConfigError, FormatError: as `compare_logits` does, except for what only loading the model can tell.
    """
    models.check_loadable(Path(base))
    _read(adapters, weights)


def compare_logits(
    base: str | Path, adapters: Sequence[str | Path], weights: Sequence[float] | None, merged: str | Path
) -> Verification:
    """Compare a merged model with its base and adapters, unmerged, on random tokens, on the CPU in fp32 (fp64 where
    RWKV needs it).

    One of the two models is in memory at a time.

    Args:
        base: The base model's folder, or the `.pth` file of an RWKV-7 or RWKV-6 model.
        adapters: Adapters of the family, in any format that a merge takes; one may come twice.
        weights: The factor of each adapter's change; None: 1.
        merged: The merged model's folder or file.

    Raises:
        ConfigError: the weights do not fit the adapters, or one of several adapters holds values of its own.
        FormatError: a model cannot be loaded or run, or adapters do not fit the model's class.
    """
    base, merged = Path(base), Path(merged)
    weighted = _read(adapters, weights)
    for path in (base, merged):
        models.check_loadable(path)
    verification = _compare(base, weighted, merged, torch.float32)
    if models.amplifies_rounding(base) and LIMIT < verification.unexplained <= _CLEARLY_WRONG:
        return _compare(base, weighted, merged, torch.float64)
    return verification


def _read(adapters: Sequence[str | Path], weights: Sequence[float] | None) -> list[WeightedAdapter]:
    """The adapters, if PEFT can load them side by side."""
    weighted = read_adapters(adapters, weights)
    replacing = dict.fromkeys(str(path) for adapter, path, _ in weighted if adapter.replacements)
    if len(weighted) > 1 and replacing:
        raise ConfigError(
            f"{', '.join(replacing)}: such a merge cannot be verified, since PEFT cannot load values that replace the"
            " base's (biases, modules to save) beside another adapter"
        )
    return weighted


def _compare(base: Path, adapters: Sequence[WeightedAdapter], merged: Path, dtype: torch.dtype) -> Verification:
    """Weights are merged in fp32, as for the files; models run in `dtype`."""
    files = open_base(merged)
    with models.quiet(), torch.no_grad():
        model, missing = models.load(base)
        rows = models.rows_for(model, base)
        attached = models.attach(model, adapters)
        unmerged = models.run(model, rows, base, dtype)
        attached.merge_and_unload()
        in_memory = models.run(model, rows, base, dtype)
        _round(model, files)
        rounded = models.run(model, rows, base, dtype)
        wanted = models.answer(model, base, beside([path for _, path, _ in adapters]))
        del model, attached
        model, missing_now = models.load(merged)
        if missing_now - missing:
            raise FormatError(f"{merged}: it lacks {', '.join(sorted(missing_now - missing))}, which the base has")
        on_disk = models.run(model, rows, merged, dtype)
        answer = models.answer(model, merged, Beside())
    sizes = {dtype: sum(e.end - e.start for e in files.entries.values() if e.dtype == dtype) for dtype in FLOATS}
    unexplained = max(_error(in_memory, unmerged, unmerged), _error(on_disk, rounded, unmerged))
    return Verification(
        tokens=sum(row.shape[1] for row in rows),
        dtype=str(FLOATS[max(sizes, key=sizes.__getitem__)]).removeprefix("torch."),
        relative_error=_error(on_disk, unmerged, unmerged),
        rounding=_error(rounded, in_memory, unmerged),
        unexplained=unexplained,
        limit=LIMIT,
        answer_tokens=len(wanted.tokens),
        same_answer=answer == wanted,
        ok=unexplained <= LIMIT and answer == wanted,
    )


def _round(model: nn.Module, files: BaseModel) -> None:
    """Round every parameter to its dtype in the files; those that the files lack stay as they are."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    located, _ = names.locate(parameters, files.entries)
    for name, tensor in located.items():
        dtype = files.entries[tensor].dtype
        if dtype in FLOATS:
            parameters[name].copy_(parameters[name].to(FLOATS[dtype]))


def _error(got: Tensor, want: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite if an output is not finite, or the shapes differ."""
    if got.shape != want.shape:
        return math.inf
    error = float((got - want).square().mean().sqrt() / reference.square().mean().sqrt())
    return error if math.isfinite(error) else math.inf
