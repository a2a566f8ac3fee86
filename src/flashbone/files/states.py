"""All tensors of one file: safetensors, or a torch pickle, whose code is never run."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files.pickled import is_of_the_disk
from flashbone.files.tensors import FLOATS


def read_state(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU and in the file's dtypes; a zipped pickle (torch's own since 1.6) is mapped, not read.

    Raises:
        FormatError: the file is broken, or holds anything but tensors with printable names.
    """
    state = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    strange = [name for name in state if not name.isprintable()]
    if strange:
        raise FormatError(f"{file}: names of tensors hold control characters: {', '.join(map(repr, strange))}")
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{file}: not a whole safetensors file ({reason}); it may be truncated, copy or download it again"
        ) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{file}: refused, this pickle is broken or holds more than tensors (pickles can run code); convert it to"
            " safetensors where you trust it"
        ) from error
    except Exception as error:  # torch's unpickler fails at a damaged file with any exception
        if is_of_the_disk(error):
            raise
        reason = " ".join(str(error).split())
        raise FormatError(f"{file}: cannot be read as a torch file; it may be truncated ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(t) for k, t in state.items()):
        raise FormatError(f"{file}: wanted a mapping from names to tensors, it holds something else")
    return {key: tensor.detach() for key, tensor in state.items()}


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with all its values on the CPU: not sparse, not quantised, not on the meta device."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


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
