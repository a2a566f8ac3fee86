"""A model's tensors into one of BlinkDL's `.pth` files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashbone.errors import ConfigError, NonFiniteError
from flashbone.files import outputs, pth
from flashbone.files.tensors import FLOATS, as_bytes

Shapes = dict[str, tuple[int, ...]]
_NAMES = {name: safe for safe, name in FLOATS.items()}


def write_pth(state: Mapping[str, Tensor], wanted: Shapes, out: Path, dtype: torch.dtype | None) -> None:
    """See `files.to_pth`; `wanted` are the tensors of a plain model."""
    if out.suffix != ".pth":
        raise ConfigError(f"to_pth: got {out}, wanted a name that ends in .pth")
    odd = [
        name
        for name in dict.fromkeys([*wanted, *state])
        if name not in state or tuple(state[name].shape) != wanted.get(name) or state[name].dtype not in _NAMES
    ]
    if odd:
        raise ConfigError(
            f"to_pth: not a plain model: {', '.join(odd)}; merge_and_unload() its adapters, and load quantised weights"
            " in their own dtype"
        )
    if away := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ConfigError(f"to_pth: {len(away)} tensors are offloaded, such as {away[0]}; load it without a device_map")
    state = {name: state[name] for name in wanted}  # in a file's order
    dtypes = {name: dtype or tensor.dtype for name, tensor in state.items()}
    if dtype is not None and dtype not in _NAMES:
        raise ConfigError(f"to_pth: got {dtype}, wanted fp64, fp32, bf16 or fp16")
    layout = [(name, _NAMES[dtypes[name]], tuple(tensor.shape)) for name, tensor in state.items()]
    size = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in state.items())
    outputs.check(out, size, None, is_file=True)

    def content(name: str) -> Iterator[memoryview]:
        tensor = state[name].detach().to("cpu", dtypes[name])
        if not tensor.isfinite().all() and state[name].isfinite().all():
            raise NonFiniteError(f"to_pth: {name} has numbers too large for {tensor.dtype}; choose a wider dtype")
        yield as_bytes(tensor)

    with outputs.whole_or_absent(out, is_file=True) as partial:
        pth.write(partial, layout, content, lambda _: None)
