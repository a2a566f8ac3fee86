"""Modules that an adapter saves whole: those that it must not adapt, and those that loading the base drew at random."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from flashbone.errors import ConfigError
from flashbone.files import patterns
from flashbone.files.folders import in_saved_module

# What PEFT's classes for these tasks save without being asked, and what transformers calls the tasks' models.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASK_CLASSES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_LOADED = "_is_hf_initialized"  # transformers marks each parameter that it read from a checkpoint
_NOT_CALLED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # PEFT cannot wrap these


def saved_names(config: Any) -> list[str]:
    """Endings of the names of all modules that PEFT saves whole with this config."""
    task = getattr(config.task_type, "value", config.task_type)
    return list(dict.fromkeys([*(config.modules_to_save or ()), *_TASK_HEADS.get(task, ())]))


def problem_of_name(configs: dict[str, Any], new: str) -> str | None:
    """What was wanted instead of this name of a new adapter, whose config is among these; None where it can be had."""
    if not new or "." in new:
        return "one that is not empty and has no dot"
    if hasattr(nn.ModuleDict(), new) or hasattr(nn.ParameterDict(), new):
        return "one that torch's modules have no attribute of"
    saved = {entry for config in configs.values() for entry in saved_names(config)}
    clashes = [(name, entry) for name in configs for entry in saved if name.endswith(entry)]
    for name, entry in clashes[:1]:
        return f"no adapter {name!r} beside the module {entry!r}, which is saved whole: PEFT compares endings"
    return None


def matches(peft_config: Any, key: str) -> Any:
    """PEFT's `check_target_module_exists`, but for modules that PEFT would adapt and then try to save whole: for
    `classifier` it saves pre_classifier, too, and of some tasks it learns the heads after it has adapted them."""
    matched = check_target_module_exists(_by_name(peft_config, key), key)
    return _ExcludedModule() if matched and in_saved_module(f"{key}.weight", saved_names(peft_config)) else matched


def _by_name(config: Any, key: str) -> Any:
    """The config with the name in place of patterns that mean it: Python's matcher may need far longer than ours."""
    texts = {name: getattr(config, name, None) for name in ("target_modules", "exclude_modules")}
    meant = {name: [key] * patterns.fullmatch(text, key) for name, text in texts.items() if isinstance(text, str)}
    return SimpleNamespace(**vars(config) | meant) if meant else config


def new_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that `from_pretrained` drew at random, as the checkpoint lacked them or had them in
    another size; of a model that it did not load none. What adapters hold does not count."""
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    loaded, opaque = {}, None
    for name, module in model.named_modules():
        parameters = module.named_parameters(recurse=False)
        if opaque is not None and name.startswith(opaque):
            continue
        opaque = f"{name}." if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) else None
        for leaf, parameter in parameters:
            # what accelerate offloads is a copy without the mark, and so are quantised weights
            if parameter.is_meta == on_meta and parameter.is_floating_point():
                loaded[f"{name}.{leaf}" if name else leaf] = getattr(parameter, _LOADED, False)
    return [name for name, is_loaded in loaded.items() if not is_loaded] if any(loaded.values()) else []


def unsaved_modules(model: nn.Module, saved: list[str]) -> list[str]:
    """Names of the modules with parameters of `new_parameters` that PEFT would not save with these endings; the
    outermost ones, and "" for the model itself."""
    modules = set()
    for parameter in new_parameters(model):
        module = parameter.rpartition(".")[0]
        while module and isinstance(model.get_submodule(module), _NOT_CALLED):
            module = module.rpartition(".")[0]
        if not in_saved_module(parameter, saved):
            modules.add(module)
    return outermost(modules)


def modules_to_add(model: Any, config: Any) -> list[str]:
    """What `modules_to_save` lacks for an adapter of any of PEFT's methods that is to be loaded on the same checkpoint:
    all that loading drew at random and, of a classifier, the head whatever its name.

    Raises:
        ConfigError: a parameter that the checkpoint lacks belongs to the model itself.
    """
    new = unsaved_modules(model, [])
    if "" in new:
        raise ConfigError(
            f"model {model.name_or_path}: its checkpoint lacks a parameter of {type(model).__name__} itself, which no"
            " adapter can save; load it with transformers, save_pretrained() it to a folder, and train from that"
        )
    heads = head_modules(model) if config.task_type == "SEQ_CLS" else []
    saved = re.compile(
        rf"(.*\.)?({'|'.join(saved_names(config)) or '(?!)'})(\..*)?"
    )  # as PEFT keeps adapters out of them
    return outermost(name for name in [*new, *heads] if not saved.fullmatch(name))


def head_modules(model: Any) -> list[str]:
    """The modules of a classifier that compute a number for each label, whatever they are called."""
    labels, backbone = model.config.num_labels, model.base_model_prefix
    return [
        name
        for name, module in model.named_children()
        if name != backbone and any(p.is_floating_point() and p.ndim and len(p) == labels for p in module.parameters())
    ]


def outermost(modules: Iterable[str]) -> list[str]:
    """These names without those of modules inside others among them."""
    names = set(modules)
    return sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def warn_of_unsaved(model: nn.Module, config: Any) -> None:
    """Name the modules of a loaded model that start at random and that no adapter with this config would save."""
    saved = saved_names(config)
    output = getattr(model, "get_output_embeddings", lambda: None)()  # new after a resize, and PEFT then saves it
    unsaved = [name for name in unsaved_modules(model, saved) if model.get_submodule(name) is not output]
    if not unsaved:
        return
    task = next((task for part, task in _TASK_CLASSES.items() if part in type(model).__name__), None)
    remedies = []
    if config.task_type is None and task is not None:
        remedies.append(f'task_type="{task}"')
        saved += _TASK_HEADS[task]
    if rest := [name for name in unsaved_modules(model, saved) if name in unsaved]:
        asked = [
            name for name in config.modules_to_save or () if name not in _TASK_HEADS.get(config.task_type or "", ())
        ]
        remedies.append(f"modules_to_save={[*asked, *rest]}")
    if "" in rest:
        remedies = ["save the model as it is now with save_pretrained, and train from that folder"]
    names = ", ".join(name or "parameters of its own" for name in unsaved)
    warnings.warn(
        f"{type(model).__name__}: its checkpoint has no {names}, which started at random, and the adapter would not"
        f" save them, so that it could not be used after loading; {'set ' * ('' not in rest)}{' and '.join(remedies)}",
        stacklevel=2,
    )
