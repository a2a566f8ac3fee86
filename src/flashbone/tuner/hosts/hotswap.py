"""Hot swap: `peft.utils.hotswap.hotswap_adapter` for BONE, in place, so that a compiled model is not compiled again.

PEFT's function looks up two names in its module: the table of methods and the function that swaps. BONE gets an entry
in the table and a branch in the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor, nn

from flashbone.errors import ConfigError, FormatError, ShapeError
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.model import keys
from flashbone.tuner.model.config import BoneConfig, BoneType

# Settings in the compiled graph, or of parameters besides the blocks. Shapes of blocks are compared when they load.
_MUST_BE_EQUAL = (
    "variant",
    "mini_r",
    "use_orthogonal",
    "orthogonal_eps",
    "bias",
    "modules_to_save",
    "parameters_to_save",
)


def support_bone(hotswap: ModuleType) -> None:
    """Extend the module `peft.utils.hotswap`."""
    table: dict[Any, list[str]] = hotswap.CONFIG_KEYS_TO_CHECK
    table[BoneType.BONE] = []  # PEFT compares with the active adapter; `_check` compares with the replaced one
    hotswap.hotswap_adapter = _readable(hotswap.hotswap_adapter)  # pyright: ignore[reportAttributeAccessIssue]
    hotswap.hotswap_adapter_from_state_dict = _branched(  # pyright: ignore[reportAttributeAccessIssue]
        hotswap.hotswap_adapter_from_state_dict
    )


def _readable(original: Callable) -> Callable:
    @functools.wraps(original)
    def hotswap_adapter(model: nn.Module, model_name_or_path: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(model, model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise FormatError(
                f"adapter {model_name_or_path}: its weights cannot be read: {error}; is the file whole?"
            ) from error

    return hotswap_adapter


def _branched(original: Callable) -> Callable:
    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not isinstance(config, BoneConfig):
            return original(model, state_dict, adapter_name, config, *args, **kwargs)
        return swap(getattr(model, "_orig_mod", model), state_dict, adapter_name, config)

    return hotswap_adapter_from_state_dict


def swap(model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: BoneConfig) -> None:
    """Replace blocks, dropout and config of an adapter in place, and reset its scale to 1; changes nothing on an error.

    Raises:
        ConfigError: the adapter does not exist or is merged, or a setting differs that cannot be swapped.
        ShapeError: the new adapter has other layers or other sizes.
    """
    ends = tuple(f".{block}.{adapter_name}" for block in (keys.BLOCK, keys.BLOCK_OF_TRANSPOSED))
    name = f".{adapter_name}"  # appended by PEFT
    plain = {key.removesuffix(name) if key.endswith(ends) else key: t for key, t in state_dict.items()}
    block_ends = (*ends, *(end.removesuffix(name) for end in ends))
    sizes = {tensor.shape[-2] for key, tensor in state_dict.items() if key.endswith(block_ends)}
    _check(model, adapter_name, config, sizes)
    set_peft_model_state_dict(model, plain, adapter_name)
    for layer in model.modules():
        if isinstance(layer, BoneLayer) and adapter_name in layer.bone_block:
            layer.set_scale(adapter_name, 1.0)
            _set_dropout(layer, adapter_name, config.dropout)
    old = model.peft_config[adapter_name]
    vars(old).update(vars(config), inference_mode=old.inference_mode)  # compiled code may hold the object


def _set_dropout(layer: BoneLayer, adapter_name: str, dropout: float) -> None:
    if getattr(layer.bone_dropout[adapter_name], "p", 0.0) != dropout:
        layer.bone_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        layer.bone_dropout[adapter_name].train(layer.training)  # pyright: ignore[reportAttributeAccessIssue]


def _check(model: Any, adapter_name: str, config: BoneConfig, block_sizes: set[int]) -> None:
    old = model.peft_config.get(adapter_name)
    if old is None:
        raise ConfigError(f"hot swap: no adapter {adapter_name!r} in this model, which has {list(model.peft_config)}")
    problems = [
        f"{field}: the model has {_sorted(old, field)!r}, the new adapter {_sorted(config, field)!r}"
        for field in _MUST_BE_EQUAL
        if _sorted(old, field) != _sorted(config, field)
    ]
    if problems:
        raise ConfigError(
            f"hot swap: adapter {adapter_name!r} cannot be replaced in place ({'; '.join(problems)}); load the new one"
            " under another name with load_adapter"
        )
    layers = {
        keys.plain(n): m for n, m in model.named_modules() if isinstance(m, BoneLayer) and adapter_name in m.bone_r
    }
    pattern = config.rank_pattern
    sizes = {
        n: pattern.get(get_pattern_key(list(pattern), keys.bare(n.removeprefix("base_model.model."))), config.r)
        for n in layers
    }
    fits = block_sizes <= {layer.bone_r[adapter_name] for layer in layers.values()}  # else loading names the misfits
    wrong = [
        f"{n} has r={layers[n].bone_r[adapter_name]}, not {r}"
        for n, r in sizes.items()
        if layers[n].bone_r[adapter_name] != r
    ]
    if fits and wrong:
        raise ShapeError(
            f"hot swap: adapter {adapter_name!r} cannot be replaced in place by one of other sizes: "
            + "; ".join(wrong[:5])
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ConfigError(f"hot swap: adapter {adapter_name!r} is merged into the model; call unmerge_adapter() first")


def _sorted(config: BoneConfig, field: str) -> Any:
    value = getattr(config, field)
    return sorted(value) if isinstance(value, (list, set, tuple)) else value
