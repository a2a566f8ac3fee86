"""Adapter files of RWKV-PEFT: one `.pth` (or safetensors) with the names of RWKV's own checkpoints.

    blocks.<i>.att.receptance.disha       the block of a projection; in older files `.bone`
    blocks.<i>.ln1.weight, ln_out.bias    LayerNorms, and of RWKV-6 every time_*: trained values, whole

Neither the mode nor the block size is stored. A block of two axes is (r, out), mode `bone`. One of three axes is
(n, r, r): a bat, of which the file does not say whether n counts input shards, as RWKV-PEFT's own mode `bat` does
(`bat-row`), or output shards, as PEFT's bat does (`bat-col`).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flashbone.checkpoint import Adapter
from flashbone.checkpoint.states import read_state
from flashbone.errors import FormatError

SUFFIXES = (".disha", ".bone")
# Names in RWKV's own checkpoints; a wrapper's leading `model.` may stand before them.
_NAME = re.compile(r"(model\.)?(emb|head|ln_out|blocks\.\d+\.(att|ffn|ln\d))(\.|$)")


@dataclass(frozen=True)
class RwkvAdapter:
    """What an adapter file of RWKV-PEFT says.

    Attributes:
        suffix: of its keys, "disha" or "bone".
        modes: "bone" (two axes), "bat" (three), or both.
        blocks: projection -> block.
        replacements: parameter -> trained value that takes its place.
    """

    suffix: str
    modes: tuple[str, ...]
    blocks: dict[str, Tensor]
    replacements: dict[str, Tensor]


def read(file: Path) -> RwkvAdapter:
    """Read an adapter file of RWKV-PEFT; tensors are on the CPU, in the file's dtypes.

    Raises:
        FormatError: it is broken, or something else; all strange keys are named at once.
    """
    state = read_state(file)
    if not any(key.endswith(SUFFIXES) for key in state):
        like = f", its names are like {next(iter(state))!r}" if state else ""
        raise FormatError(
            f"{file}: no adapter of RWKV-PEFT, none of its {len(state)} tensors ends in {' or '.join(SUFFIXES)}{like}"
        )
    blocks, replacements, problems = {}, {}, []
    for key, tensor in state.items():
        if not _NAME.match(key):
            problems.append(f"{key}: not a name of an RWKV model")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: got {tensor.dtype}, wanted floating point numbers")
        elif not key.endswith(SUFFIXES):
            replacements[key] = tensor
        elif not _is_block(tensor):
            problems.append(f"{key}: got shape {tuple(tensor.shape)}, wanted (r, out) or (n, r, r)")
        else:
            blocks[key.rpartition(".")[0]] = tensor
    suffixes = sorted({key.rpartition(".")[2] for key in state if key.endswith(SUFFIXES)})
    if len(suffixes) > 1:
        problems.append(f"it mixes keys that end in {' and '.join(suffixes)}")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    modes = {2: "bone", 3: "bat"}
    return RwkvAdapter(
        suffixes[0], tuple(modes[n] for n in sorted({b.ndim for b in blocks.values()})), blocks, replacements
    )


def _is_block(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and (tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2]))


def read_adapter(file: Path) -> Adapter:
    raise NotImplementedError


def write(adapter: Adapter, file: Path) -> None:
    raise NotImplementedError
