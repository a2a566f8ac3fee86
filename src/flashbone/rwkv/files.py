"""BlinkDL's `.pth` files: models out of them and into them, with every name and shape checked."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashbone.errors import ConfigError, FormatError
from flashbone.files import pth
from flashbone.files.states import read_state
from flashbone.files.tensors import FLOATS, TensorFile
from flashbone.rwkv.config import CONFIGS, RwkvConfig, Sizes
from flashbone.rwkv.model import RwkvForCausalLM
from flashbone.rwkv.register import model_class
from flashbone.rwkv.writing import Shapes


def read_config(path: str | Path) -> RwkvConfig:
    """The configuration of the model in a `.pth` file: version and sizes, as its names and shapes say.

    Raises:
        FormatError: the file is broken, holds another version of RWKV or something else, or lacks tensors, has unknown
            ones or ones of strange shapes; all are named.
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
    model_of = model_class(config)
    shapes, tied = model_of.expected_shapes(config), pth.tied(file)
    state = {name: tensor.view(shapes[name]) for name, tensor in read_state(file.path).items()}
    state |= {name: state[name].clone() for name in tied}  # the models tie nothing
    dtype = dtype or kwargs.pop("torch_dtype", None) or FLOATS[common]
    model = model_of.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
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
        FlashboneError: the path exists already, or the disk is full.
    """
    if not isinstance(model, RwkvForCausalLM):
        raise ConfigError(f"to_pth: got a {type(model).__name__}, wanted an RWKV model; call merge_and_unload() first")
    model.to_pth(path, dtype)


def _scan(path: Path) -> TensorFile:
    if not path.is_file():
        raise FormatError(f"{path}: no such file; the .pth file of an RWKV model was wanted")
    return pth.scan(path)


def _checked(file: TensorFile) -> RwkvConfig:
    """The configuration that the file's shapes mean, after a comparison of every tensor."""
    shapes = {entry.name: entry.shape for entry in file.entries}
    config = _config_of(str(file.path), shapes)
    wanted = model_class(config).expected_shapes(config)
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    for entry in file.entries:
        if entry.name not in wanted:
            problems.append(f"{entry.name} is unknown")
        elif not _fits(entry.shape, wanted[entry.name]):
            problems.append(f"{entry.name} has shape {entry.shape}, wanted {wanted[entry.name]}")
        elif entry.dtype not in FLOATS:
            problems.append(f"{entry.name} is {entry.dtype}, wanted {', '.join(FLOATS)}")
    if problems:
        raise FormatError(f"{file.path}: as an {config.title} model: {'; '.join(problems)}")
    return config


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the sizes agree; vectors come as (C,) and as (1, 1, C)."""
    return [size for size in shape if size != 1] == [size for size in wanted if size != 1]


# What only one version has, in its first block.
_MARKS = {config.title: config.mark for config in CONFIGS}
_MARKS |= {"RWKV-5": "blocks.0.att.time_mix_g", "RWKV-4 or 5": "blocks.0.att.time_mix_k"}


def _config_of(where: str, shapes: Shapes) -> RwkvConfig:
    versions = [title for title, name in _MARKS.items() if name in shapes]
    if not versions:
        like = f", its names are like {next(iter(shapes))}" if shapes else ""
        raise FormatError(f"{where}: is no RWKV model, it has none of {', '.join(_MARKS.values())}{like}")
    configs = {config.title: config for config in CONFIGS}
    if versions[0] not in configs:
        raise FormatError(f"{where}: is an {versions[0]} model; {' and '.join(sorted(configs))} can be loaded")
    if len(versions) > 1:
        names = ", ".join(_MARKS[version] for version in versions)
        raise FormatError(f"{where}: mixes {' and '.join(versions)}, it has {names}; take one model's file")
    return configs[versions[0]].from_shapes(Sizes(where, shapes))
