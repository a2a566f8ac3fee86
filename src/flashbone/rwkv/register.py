"""RWKV's configurations, models and tokenizer in transformers' Auto classes, as soon as those exist."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from flashbone.rwkv.config import CONFIGS, RwkvConfig

if TYPE_CHECKING:
    from flashbone.rwkv.model import RwkvForCausalLM


def register_configs(auto: ModuleType) -> None:
    """Tell AutoConfig, in transformers.models.auto.configuration_auto."""
    for config in CONFIGS:
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def register_tokenizer(auto: ModuleType) -> None:
    """Tell AutoTokenizer, in transformers.models.auto.tokenization_auto."""
    from flashbone.rwkv.tokenizer import RwkvTokenizer

    for config in CONFIGS:
        auto.AutoTokenizer.register(config, slow_tokenizer_class=RwkvTokenizer, exist_ok=True)


def register_models() -> None:
    """Tell AutoModelForCausalLM.

    When the first configuration is made: importing models while transformers itself is being imported would run in
    circles, and whoever asks for a model by its configuration has made one.
    """
    from transformers import AutoModelForCausalLM

    for model in _models():
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def model_class(config: RwkvConfig) -> type[RwkvForCausalLM]:
    """The model of a configuration."""
    return next(model for model in _models() if model.config_class is type(config))


def _models() -> list[Any]:
    """One for each version: the public ones."""
    from flashbone import rwkv

    return [getattr(rwkv, name) for name in rwkv.__all__ if name.endswith("ForCausalLM")]


RwkvConfig.when_made.append(register_models)
