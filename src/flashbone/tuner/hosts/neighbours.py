"""BONE next to adapters of other methods: what adds up, and what is refused with the way that does.

Adapters of different methods wrap each other. A LoRA inside a Bone adapter that shifts the layer's input would see the
shifted input, so that the model would not be the sum of both; a Bone adapter inside a LoRA is that sum, which
transformers' `add_adapter` can make. PeftMixedModel cannot: the one method by which it makes layers is a chain of
types, to which nothing can be registered.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.tuner.model.config import BoneType

REMEDY = (
    "the BONE adapter first, then the others, with model.add_adapter of transformers or peft.inject_adapter_in_model"
)


def refuse_bone(mixed_model: ModuleType) -> None:
    """Let the module `peft.mixed_model` refuse a BoneConfig in one clear line, wherever it checks a config."""
    check = mixed_model._check_config_compatible

    def _check_config_compatible(peft_config: Any) -> None:
        if peft_config.peft_type == BoneType.BONE:
            raise ConfigError(f"PeftMixedModel: BONE adapters cannot be put into it; put onto a plain model {REMEDY}")
        check(peft_config)

    mixed_model._check_config_compatible = _check_config_compatible  # pyright: ignore[reportAttributeAccessIssue]


def check_order(layer: str, inside: object, variant: str) -> None:
    """Refuse a variant that shifts the layer's input where another method's adapter sits inside.

    Raises:
        ConfigError: the other adapter would see the shifted input, and the adapters would not add up.
    """
    kind = variants.get(variant)
    if kind.delta_depends_on_weight and not kind.reads_weight:
        raise ConfigError(
            f"{layer}: its {type(inside).__module__}.{type(inside).__name__} adapter would see the input that {variant}"
            f" shifts, so that the two would not add up; put {REMEDY}"
        )
