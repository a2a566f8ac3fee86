"""Register BONE with PEFT: its tables, its namespace, and the functions that need a branch for BONE."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from flashbone.errors import ConfigError


def register(peft: ModuleType) -> None:
    """Register BONE with an imported peft: `get_peft_model`, saving, loading, and the old import paths."""
    from flashbone.tuner.hosts import hotswap
    from flashbone.tuner.layers import layer
    from flashbone.tuner.model import card, config, keys, loading, model

    mapping, tuners = import_module("peft.mapping"), import_module("peft.tuners")

    kind = config.BoneType.BONE
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config.BoneConfig  # pyright: ignore[reportArgumentType]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = model.BoneModel  # pyright: ignore[reportArgumentType]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = model.BoneModel.prefix  # pyright: ignore[reportArgumentType]
    mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[kind] = model.BoneModel  # so that PEFT gets to `_refuse_bone`

    names = {c.__name__: c for c in (config.BoneConfig, layer.BoneLayer, layer.BoneLinear, model.BoneModel)}
    bone = ModuleType("peft.tuners.bone", "PEFT's former module of the Bone method; the classes are flashbone's.")
    bone.__path__ = []
    bone.__dict__.update(names, __all__=list(names), config=config, layer=layer, model=model)
    sys.modules.update(
        {"peft.tuners.bone": bone}
        | {f"peft.tuners.bone.{m.__name__.rpartition('.')[2]}": m for m in (config, layer, model)}
    )
    bone.__spec__ = ModuleSpec("peft.tuners.bone", None, is_package=True)
    vars(tuners)["bone"] = bone
    for target in (peft, tuners):
        vars(target).update(BoneConfig=config.BoneConfig, BoneModel=model.BoneModel)
        vars(target)["__all__"] += [name for name in ("BoneConfig", "BoneModel") if name not in vars(target)["__all__"]]
    loading.wrap_peft_model(peft.PeftModel)
    _extend_files(keys, loading)
    card.write_cards(peft.PeftModel)
    _refuse_bone(import_module("peft.mixed_model"))
    hotswap.support_bone(import_module("peft.utils.hotswap"))


def _extend_files(keys: ModuleType, loading: ModuleType) -> None:
    """Make PEFT's functions for the tensors of files tell adapters apart, and read former names of modules."""
    files = import_module("peft.utils.save_and_load")
    users = [import_module("peft"), import_module("peft.utils"), import_module("peft.peft_model")]
    users += [files, import_module("peft.functional")]
    wrappers = {
        "_filter_state_dict_for_adapter_name": keys.of_other_adapters,
        "set_peft_model_state_dict": loading.names_as_now,
    }
    for name, wrapper in wrappers.items():
        original = getattr(files, name, None)  # older versions lack the first
        for module in users if original is not None else ():
            if vars(module).get(name) is original:
                setattr(module, name, wrapper(original))


def _refuse_bone(mixed_model: ModuleType) -> None:
    """Make the module `peft.mixed_model` refuse a BoneConfig: it creates layers in a chain of types, to which no method
    can be added."""
    from flashbone.tuner.model.config import BoneType
    from flashbone.tuner.model.targets import BONE_FIRST

    check = mixed_model._check_config_compatible

    def _check_config_compatible(peft_config: Any) -> None:
        if peft_config.peft_type == BoneType.BONE:
            raise ConfigError(f"PeftMixedModel does not support BONE adapters; put onto a plain model {BONE_FIRST}")
        check(peft_config)

    mixed_model._check_config_compatible = _check_config_compatible  # pyright: ignore[reportAttributeAccessIssue]
