"""BlinkDL's `.pth` files: models out of them and into them, with every name and shape checked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashbone.errors import ConfigError, FormatError, NonFiniteError
from flashbone.files import outputs, pth
from flashbone.files.states import read_state
from flashbone.files.tensors import FLOATS, TensorFile, as_bytes
from flashbone.rwkv.config import Rwkv6Config, Rwkv7Config, RwkvConfig
from flashbone.rwkv.model import Rwkv6ForCausalLM, Rwkv7ForCausalLM, RwkvForCausalLM

_MODELS = {Rwkv7Config.model_type: Rwkv7ForCausalLM, Rwkv6Config.model_type: Rwkv6ForCausalLM}
_NAMES = {name: safe for safe, name in FLOATS.items()}
Shapes = dict[str, tuple[int, ...]]


def read_config(path: str | Path) -> RwkvConfig:
    """The configuration of the model in a `.pth` file: version and sizes, as its names and shapes say.

    Raises:
        FormatError: the file is broken, holds another version of RWKV or something else, or lacks tensors, has unknown
            ones or ones of strange shapes, all of which are named.
    """
    return _checked(_scan(Path(path)))


def from_pth(path: str | Path, dtype: torch.dtype | None = None, **kwargs: Any) -> RwkvForCausalLM:
    """The model in a `.pth` file, in eval mode. No code in the file is run; the file is mapped, not read as a whole.
    While the model lives in the CPU's memory, nothing may write into the file in place.

    Args:
        path: The file.
        dtype: Of the model. None: as most of the file's tensors are.
        **kwargs: For `from_pretrained`, such as `quantization_config` or `device_map`; `wkv_backend` goes to the
            configuration.

    Raises:
        FormatError: as for `read_config`.
    """
    file = _scan(Path(path))
    config = _checked(file)
    if "wkv_backend" in kwargs:
        config = type(config)(**config.to_dict() | {"wkv_backend": kwargs.pop("wkv_backend")})
    common = Counter(entry.dtype for entry in file.entries).most_common(1)[0][0]
    shapes, tied = expected_shapes(config), pth.tied(file)
    state = {name: tensor.view(shapes[name]) for name, tensor in read_state(file.path).items()}
    state |= {name: state[name].clone() for name in tied}  # the models tie nothing
    dtype = dtype or kwargs.pop("torch_dtype", None) or FLOATS[common]
    model = _MODELS[config.model_type].from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
    # What an adapter's file names as its base; a bare `a.pth` PEFT would look for on the hub.
    is_plain = not os.path.isabs(path) and not str(path).startswith(".")
    model.name_or_path = model.config.name_or_path = os.path.join(os.curdir, path) if is_plain else str(path)
    return model


def to_pth(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as one new `.pth` file, which appears whole or not at all.

    Args:
        model: A plain RWKV model of this package; of an adapted one, `merge_and_unload()` makes one.
        path: Where to; nothing may be there.
        dtype: Of the file. None: as the model's tensors are.

    Raises:
        ConfigError: it is another model, still has adapters or quantised weights in it, or is offloaded.
        NonFiniteError: a number is too large for `dtype`.
        FlashboneError: something is there already, or the disk is full.
    """
    out = Path(path)
    if not isinstance(model, RwkvForCausalLM):
        raise ConfigError(f"to_pth: got a {type(model).__name__}, wanted an RWKV model; call merge_and_unload() first")
    if out.suffix != ".pth":
        raise ConfigError(f"to_pth: got {out}, wanted a name that ends in .pth")
    state, wanted = model.state_dict(), expected_shapes(model.config)
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


def expected_shapes(config: RwkvConfig) -> Shapes:
    """Name and shape of every tensor of a model, in the order of a file."""
    with torch.device("meta"):
        model = _MODELS[config.model_type](config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _scan(path: Path) -> TensorFile:
    if not path.is_file():
        raise FormatError(f"{path}: no such file; the .pth file of an RWKV model was wanted")
    return pth.scan(path)


def _checked(file: TensorFile) -> RwkvConfig:
    """The configuration that the file's shapes mean, of which every tensor has been compared."""
    shapes = {entry.name: entry.shape for entry in file.entries}
    config = _config_of(str(file.path), shapes)
    wanted = expected_shapes(config)
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    for entry in file.entries:
        if entry.name not in wanted:
            problems.append(f"{entry.name} is unknown")
        elif not _fits(entry.shape, wanted[entry.name]):
            problems.append(f"{entry.name} has shape {entry.shape}, wanted {wanted[entry.name]}")
        elif entry.dtype not in FLOATS:
            problems.append(f"{entry.name} is {entry.dtype}, wanted {', '.join(FLOATS)}")
    if problems:
        raise FormatError(f"{file.path}: as an {_TITLES[config.model_type]} model: {'; '.join(problems)}")
    return config


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the sizes agree; vectors come as (C,) and as (1, 1, C)."""
    return [size for size in shape if size != 1] == [size for size in wanted if size != 1]


_TITLES = {Rwkv7Config.model_type: "RWKV-7", Rwkv6Config.model_type: "RWKV-6"}
# What only one version has, in its first block.
_MARKS = {
    "RWKV-7": "blocks.0.att.r_k",
    "RWKV-6": "blocks.0.att.time_maa_x",
    "RWKV-5": "blocks.0.att.time_mix_g",
    "RWKV-4 or 5": "blocks.0.att.time_mix_k",
}


def _config_of(where: str, shapes: Shapes) -> RwkvConfig:
    found = [version for version, name in _MARKS.items() if name in shapes]
    if not found:
        like = f", its names are like {next(iter(shapes))}" if shapes else ""
        raise FormatError(f"{where}: is no RWKV model, it has none of {', '.join(_MARKS.values())}{like}")
    if found[0] not in _TITLES.values():
        raise FormatError(f"{where}: is an {found[0]} model; RWKV-6 and RWKV-7 can be loaded")
    if len(found) > 1:
        names = ", ".join(_MARKS[version] for version in found)
        raise FormatError(f"{where}: mixes {' and '.join(found)}, it has {names}; take one model's file")
    return (_config7 if found[0] == "RWKV-7" else _config6)(where, shapes)


def _config7(where: str, shapes: Shapes) -> Rwkv7Config:
    size = _Sizes(where, shapes)
    return Rwkv7Config(
        **size.common(size("blocks.0.att.r_k", 1, 2)),
        decay_rank=size("blocks.0.att.w1", 1, 2),
        rate_rank=size("blocks.0.att.a1", 1, 2),
        value_rank=size("blocks.1.att.v1" if "blocks.1.att.v1" in shapes else "blocks.0.att.v1", 1, 2, 1),
        gate_rank=size("blocks.0.att.g1", 1, 2),
        has_first_values="blocks.0.att.v0" in shapes,
    )


def _config6(where: str, shapes: Shapes) -> Rwkv6Config:
    size = _Sizes(where, shapes)
    return Rwkv6Config(
        **size.common(size("blocks.0.att.time_faaaa", 1, 2)),
        mix_rank=size("blocks.0.att.time_maa_w2", 1, 3),
        decay_rank=size("blocks.0.att.time_decay_w1", 1, 2),
    )


class _Sizes:
    """Reads sizes off shapes, with one error where there are none."""

    def __init__(self, where: str, shapes: Shapes) -> None:
        self.where, self.shapes = where, shapes

    def __call__(self, name: str, axis: int, axes: int, default: int | None = None) -> int:
        if name not in self.shapes and default is not None:
            return default
        shape = self.shapes.get(name)
        if shape is None or len(shape) != axes or 0 in shape:
            got = "is missing" if shape is None else f"has shape {shape}, wanted {axes} axes"
            raise FormatError(f"{self.where}: {name} {got}; is the file whole?")
        return shape[axis]

    def common(self, head_size: int) -> dict[str, int]:
        """What both versions have, as arguments of a configuration."""
        hidden = self("emb.weight", 1, 2)
        if hidden % head_size:
            raise FormatError(f"{self.where}: heads of {head_size} do not divide the width {hidden} of emb.weight")
        parts = [name.split(".") for name in self.shapes if name.startswith("blocks.")]
        numbers = {int(part[1]) for part in parts if part[1].isdecimal()}  # others are unknown names
        gap = next(i for i in range(len(numbers) + 1) if i not in numbers)
        if gap < len(numbers):
            raise FormatError(f"{self.where}: has blocks.{max(numbers)}, but no blocks.{gap}; is the file whole?")
        return {
            "vocab_size": self("emb.weight", 0, 2),
            "hidden_size": hidden,
            "num_hidden_layers": len(numbers),
            "intermediate_size": self("blocks.0.ffn.key.weight", 0, 2),
            "head_size": head_size,
        }
