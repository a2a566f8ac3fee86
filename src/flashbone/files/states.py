"""All tensors of one file: safetensors, or a torch pickle, whose code is never run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashbone.errors import FormatError, one_line, visible
from flashbone.files import pth, tensors
from flashbone.files.tensors import FLOATS


def read_state(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU and in the file's dtypes; a torch file is mapped, not read.

    Raises:
        FormatError: the file is broken, or holds anything but tensors with printable names.
    """
    state = _read_safetensors(file) if file.suffix == ".safetensors" else pth.read(file)
    strange = [name for name in state if not name.isprintable()]
    if strange:
        raise FormatError(f"{file}: names of tensors hold control characters: {', '.join(map(visible, strange))}")
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    tensors.scan(file)  # its errors are shorter than the library's
    try:
        return load_file(file)
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise FormatError(
            f"{file}: not a whole safetensors file ({reason}); it may be truncated, copy or download it again"
        ) from error


def write_safetensors(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a new safetensors file; the same tensors give the same bytes.

    Raises:
        FormatError: tensors of other dtypes than fp64, fp32, bf16 and fp16; all are named, and nothing is written.
    """
    save_file(separate(state), file, metadata={"format": "pt"})


def write_pickle(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a new torch file; the same tensors in the same order give the same bytes.

    Raises:
        FormatError: as `write_safetensors`.
    """
    plain = separate(state)
    with file.open("xb") as opened:  # torch would write the file's own name into it
        torch.save(plain, opened)


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and without shared memory; copied only where needed.

    Raises:
        FormatError: tensors of other dtypes than fp64, fp32, bf16 and fp16; all are named.
    """
    dtypes = {name: tensor.dtype for name, tensor in state.items() if tensor.dtype not in FLOATS.values()}
    odd = [f"{name} is {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items()]
    if odd:
        raise FormatError(f"{', '.join(odd)}, wanted fp64, fp32, bf16 or fp16; convert them with torch first")
    apart, seen = {}, set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        is_apart = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = tensor if is_apart else tensor.clone(memory_format=torch.contiguous_format)
    return apart
