"""All tensors of one file: safetensors, or a torch pickle, of which no code is run."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flashbone.errors import FormatError


def read_state(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU and in the file's dtypes; a zipped pickle (torch's own since 1.6) is mapped, not read.

    Raises:
        FormatError: the file is broken, or holds something else than tensors.
    """
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, ValueError) as error:
        raise FormatError(
            f"{file}: not a whole safetensors file ({error}); it may be truncated, copy or download it again"
        ) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{file}: refused, this pickle is broken or holds more than tensors (pickles can run code); convert it to"
            " safetensors where you trust it"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch's unpickler stumbles over a damaged file in any way it likes
        reason = " ".join(str(error).split())
        raise FormatError(f"{file}: cannot be read as a torch file; it may be truncated ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise FormatError(f"{file}: wanted a mapping from names to tensors, it holds something else")
    return {str(key): tensor for key, tensor in state.items()}
