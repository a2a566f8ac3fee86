"""Wrap the adapter methods of transformers' and diffusers' models; `tuner/hosts/model_methods.py` says what BONE does.

The hosts may define these methods, and be asked to load an adapter, before anything has imported peft; and importing
peft here would import transformers from within itself. So the wrappers are light, and their first call loads the rest.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from flashbone import floors
from flashbone.import_hook import when_imported

_SWITCHES = ("set_adapter", "enable_adapters", "disable_adapters", "delete_adapter")
_METHODS = {
    "transformers.integrations.peft": ("PeftAdapterMixin", ("add_adapter", "load_adapter", *_SWITCHES)),
    "transformers.generation.utils": ("GenerationMixin", ("generate",)),
    "diffusers.loaders.peft": ("PeftAdapterMixin", ("add_adapter", "save_lora_adapter")),
    "transformers.trainer": ("Trainer", ("_load_best_model",)),
    "trl.trainer.base_trainer": ("_BaseTrainer", ("create_model_card",)),
}
# Of these a model without adapters needs nothing, and peft is not imported for it.
_FOR_ADAPTED = ("generate", *_SWITCHES)


def wrap_when_imported() -> None:
    """Wrap the methods of both hosts as soon as they define them."""
    for module in _METHODS:
        when_imported(module, _wrap)


def _wrap(host: ModuleType) -> None:
    if not floors.are_met():
        return
    owner, methods = _METHODS[host.__name__]
    wrapped: Any = getattr(host, owner, None)
    for name in methods:
        if hasattr(wrapped, name):  # older versions lack some
            setattr(wrapped, name, _wrapped(getattr(wrapped, name), name))


def _wrapped(original: Callable, name: str) -> Callable:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _FOR_ADAPTED and not getattr(self, "_hf_peft_config_loaded", False):
            return original(self, *args, **kwargs)
        import_module("peft")  # before flashbone.tuner, whatever thread comes first
        return getattr(import_module("flashbone.tuner.hosts.model_methods"), name)(original, self, *args, **kwargs)

    return method
