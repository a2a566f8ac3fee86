"""The Bone family of block-affine adapters for PEFT, transformers and TRL.

`import flashbone`, before or after peft, gives PEFT its BONE method back, and transformers RWKV-7 and RWKV-6. The
import itself is light: names are loaded on first use (PEP 562), and things are registered as soon as peft has been
imported, and transformers' Auto classes.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flashbone import floors
from flashbone.host_hooks import wrap_when_imported
from flashbone.import_hook import when_imported

if TYPE_CHECKING:
    from flashbone.conversion import convert as convert
    from flashbone.errors import FlashboneError as FlashboneError
    from flashbone.merge import merge_checkpoint as merge_checkpoint
    from flashbone.tuner.layers.layer import BoneLayer as BoneLayer
    from flashbone.tuner.layers.layer import BoneLinear as BoneLinear
    from flashbone.tuner.model.config import BoneConfig as BoneConfig
    from flashbone.tuner.model.model import BoneModel as BoneModel

__version__ = "0.1.0"

_PUBLIC = {
    "BoneConfig": "flashbone.tuner.model.config",
    "BoneLayer": "flashbone.tuner.layers.layer",
    "BoneLinear": "flashbone.tuner.layers.layer",
    "BoneModel": "flashbone.tuner.model.model",
    "FlashboneError": "flashbone.errors",
    "convert": "flashbone.conversion",
    "merge_checkpoint": "flashbone.merge",
}
__all__ = [
    "BoneConfig",
    "BoneLayer",
    "BoneLinear",
    "BoneModel",
    "FlashboneError",
    "convert",
    "merge_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flashbone' has no attribute {name!r}")
    if _PUBLIC[name].startswith("flashbone.tuner"):
        if not floors.are_met():
            floors.check(but=floors.OF_COMMANDS)
        import_module("peft")  # before flashbone.tuner, whatever thread comes first: its import loads that package
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _register(peft: ModuleType) -> None:
    if floors.are_met():
        import_module("flashbone.tuner.hosts.registration").register(peft)


def _register_rwkv_configs(auto: ModuleType) -> None:
    if floors.are_met():
        import_module("flashbone.rwkv.register").register_configs(auto)


def _register_rwkv_models(config: ModuleType) -> None:
    import_module("flashbone.rwkv.register")  # which registers them when the first configuration is made


def _register_rwkv_tokenizer(auto: ModuleType) -> None:
    if floors.are_met():
        import_module("flashbone.rwkv.register").register_tokenizer(auto)


when_imported("peft", _register)
when_imported("flashbone.rwkv.config", _register_rwkv_models)
when_imported("transformers.models.auto.configuration_auto", _register_rwkv_configs)
when_imported("transformers.models.auto.tokenization_auto", _register_rwkv_tokenizer)
wrap_when_imported()
