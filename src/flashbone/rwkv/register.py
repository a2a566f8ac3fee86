"""RWKV's configurations and tokenizer in transformers' Auto classes, as soon as those exist."""

from __future__ import annotations

from types import ModuleType


def register_configs(auto: ModuleType) -> None:
    """Tell AutoConfig, in transformers.models.auto.configuration_auto; the models follow when the first configuration
    is made (`config.register_models`)."""
    from flashbone.rwkv.config import Rwkv6Config, Rwkv7Config

    for config in (Rwkv7Config, Rwkv6Config):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def register_tokenizer(auto: ModuleType) -> None:
    """Tell AutoTokenizer, in transformers.models.auto.tokenization_auto."""
    from flashbone.rwkv.config import Rwkv6Config, Rwkv7Config
    from flashbone.rwkv.tokenizer import RwkvTokenizer

    for config in (Rwkv7Config, Rwkv6Config):
        auto.AutoTokenizer.register(config, slow_tokenizer_class=RwkvTokenizer, exist_ok=True)
