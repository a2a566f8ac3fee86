"""The published settings of the orthogonal variant, by the size of the model that is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.model.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from flashbone.tuner.model.config import BoneConfig


# Fields of BoneConfig that say what kind of adapter is wanted; one that is None says nothing.
KIND = ("r", "variant", "init_weights", "bottleneck_size")


@dataclass(frozen=True)
class Preset:
    """Settings for models with fewer than `below` parameters.

    Attributes:
        below: number of parameters, exclusive.
        r: block size (`bottleneck_size`).
        dropout: on the adapter's input.
        orthogonal_eps: ridge of the orthogonal map.
    """

    below: float
    r: int
    dropout: float
    orthogonal_eps: float


# Published for below 100M, 100M to 1B, 1B to 7B and 7B to 13B. "13B" is nominal: Llama-2-13B has 13.02e9 parameters, so
# that the last limit lies a little above 13e9.
PRESETS = (
    Preset(0.1e9, 32, 0.1, 1e-6),
    Preset(1e9, 64, 0.15, 1e-6),
    Preset(7e9, 128, 0.2, 1e-5),
    Preset(13.5e9, 256, 0.25, 1e-5),
)


def published_preset(parameters: int) -> Preset | None:
    """The published setting for a model of that many parameters; None above all that were published."""
    return next((preset for preset in PRESETS if parameters < preset.below), None)


def parameter_count(model: nn.Module | PretrainedConfig | str | Path) -> int:
    """Number of parameters of a model, or of the one that a config, a folder or a hub id describes (nothing is loaded).

    Of a PEFT model the base counts: no adapters, no copies of modules to save. Tied weights count once, weights that
    bitsandbytes has packed to 4 bits as the numbers that they hold, and weights that ZeRO-3 has partitioned as the
    whole. Other quantisers keep packed weights in buffers or in shapes of their own (GPTQ, AWQ, HQQ), where they are
    not counted, or not right; pass the config of such a model.

    Raises:
        ConfigError: there is no such model, see `skeleton`.
    """
    module = model if isinstance(model, nn.Module) else skeleton(model)
    base: nn.Module = module.get_base_model() if isinstance(module, PeftModel) else module  # without prompts
    added = _added_by_peft(base)
    return sum(_numbers_in(parameter) for parameter in base.parameters() if id(parameter) not in added)


def _added_by_peft(base: nn.Module) -> set[int]:
    """Identities of the parameters that adapters brought into a model."""
    parts = (part for part in base.modules() if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper))
    held = (getattr(part, name, None) for part in parts for name in part.adapter_layer_names)
    return {id(parameter) for module in held if isinstance(module, nn.Module) for parameter in module.parameters()}


def _numbers_in(parameter: Any) -> int:
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    # Two numbers in each byte, once it is quantised.
    packed = type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", True)
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


def recommended(
    cls: type[BoneConfig], model: nn.Module | PretrainedConfig | str | Path, overrides: dict[str, Any]
) -> BoneConfig:
    """See `BoneConfig.recommended`."""
    overrides = without_empty_kind(overrides)
    if _is_another_variant(overrides):
        return cls(**overrides)
    parameters = parameter_count(model)
    preset = published_preset(parameters)
    if preset is None:
        raise ConfigError(
            f"the model has {parameters / 1e9:.3g}B parameters, and the published settings of the orthogonal variant"
            ' end at 13B; use BoneConfig(r=64, variant="bone"), or choose bottleneck_size yourself'
        )
    fields: dict[str, Any] = {"dropout": preset.dropout, "orthogonal_eps": preset.orthogonal_eps}
    if "r" in overrides:
        fields["variant"] = "orthogonal"
    else:
        fields["bottleneck_size"] = preset.r
    return cls(**{**fields, **overrides})


def without_empty_kind(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those that choose the kind of adapter and are None, which choose nothing."""
    return {name: value for name, value in fields.items() if value is not None or name not in KIND}


def _is_another_variant(overrides: dict[str, Any]) -> bool:
    """Whether the settings that were published, all of the orthogonal variant, do not apply."""
    return overrides.get("variant", "orthogonal") != "orthogonal" or overrides.get("init_weights") == "bat"
