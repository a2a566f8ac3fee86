"""The published settings of the orthogonal variant, by the size of the model that is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.tuner.layers.quantized import weight_count
from flashbone.tuner.model.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig


PRESET_VARIANT = variants.of_size_field("bottleneck_size").name
# Fields of BoneConfig that choose the kind of adapter; None chooses nothing.
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


# Published for below 100M, 100M to 1B, 1B to 7B and 7B to 13B. "13B" is nominal: Llama-2-13B has 13.02e9 parameters,
# so the last limit is a little above 13e9.
PRESETS = (
    Preset(0.1e9, 32, 0.1, 1e-6),
    Preset(1e9, 64, 0.15, 1e-6),
    Preset(7e9, 128, 0.2, 1e-5),
    Preset(13.5e9, 256, 0.25, 1e-5),
)


def published_preset(parameters: int) -> Preset | None:
    """The published settings for a model with this many parameters; None above 13B."""
    return next((preset for preset in PRESETS if parameters < preset.below), None)


def parameter_count(model: nn.Module | PretrainedConfig | str | Path) -> int:
    """Number of parameters of a model, or of the one that a config, a folder or a hub id describes (nothing is loaded).

    Counts the base of a PEFT model, without adapters and copies of modules to save. Tied weights count once, and
    weights that bitsandbytes packs to 4 bits or that ZeRO-3 partitions count in full. GPTQ, AWQ and HQQ store packed
    weights elsewhere or in other shapes, so the count is wrong for them; pass the model's config instead.

    Raises:
        ConfigError: there is no such model, see `skeleton`.
    """
    module = model if isinstance(model, nn.Module) else skeleton(model)
    base: nn.Module = module.get_base_model() if isinstance(module, PeftModel) else module  # without prompts
    added = _added_by_peft(base)
    return sum(weight_count(parameter) for parameter in base.parameters() if id(parameter) not in added)


def _added_by_peft(base: nn.Module) -> set[int]:
    """Ids of the parameters that adapters added to a model."""
    wrappers = (module for module in base.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper))
    added = (getattr(wrapper, name, None) for wrapper in wrappers for name in wrapper.adapter_layer_names)
    return {id(parameter) for module in added if isinstance(module, nn.Module) for parameter in module.parameters()}


def recommended_fields(model: nn.Module | PretrainedConfig | str | Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of BoneConfig: the published ones for this model, then the overrides; see `BoneConfig.recommended`."""
    overrides = without_empty_kind(overrides)
    if overrides.get("variant", PRESET_VARIANT) != PRESET_VARIANT or isinstance(overrides.get("init_weights"), str):
        return overrides  # nothing was published for other variants
    parameters = parameter_count(model)
    preset = published_preset(parameters)
    if preset is None:
        raise ConfigError(
            f"the model has {parameters / 1e9:.3g}B parameters, and the published settings of the orthogonal variant"
            ' end at 13B; use BoneConfig(r=64, variant="bone"), or choose bottleneck_size yourself'
        )
    size = {"variant": PRESET_VARIANT} if "r" in overrides else {"bottleneck_size": preset.r}
    return {"dropout": preset.dropout, "orthogonal_eps": preset.orthogonal_eps, **size, **overrides}


def without_empty_kind(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those of `KIND` that are None."""
    return {name: value for name, value in fields.items() if value is not None or name not in KIND}
