"""The two bounds that every adapter lies between: all of the model's own parameters train, or its head alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flashbone.errors import ConfigError

# PEFT finds a classification head by these names (PeftModelForSequenceClassification).
HEADS = ("classifier", "score")


def train_all(model: Any) -> Any:
    """All parameters train, in fp32 where they are in half precision."""
    if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
        model.float()
    return model.requires_grad_(True)


def train_head(model: Any) -> Any:
    """The head alone trains: a classifier, or a language model's output projection, untied from the embeddings.

    Raises:
        ConfigError: the model has none.
    """
    heads = find_classifiers(model)
    if not heads and hasattr(model, "get_output_embeddings") and not is_classifier(model):
        heads = [module for module in [model.get_output_embeddings()] if module is not None]
    if not heads:
        raise ConfigError(f"{type(model).__name__} has no head: no classifier, and no output projection")
    model.requires_grad_(False)
    for head in heads:
        _untie(model, head)
        if any(p.element_size() < 4 for p in head.parameters()):
            head.float()
            head.register_forward_pre_hook(_in_fp32)
        head.requires_grad_(True)
    return model


def is_classifier(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def find_classifiers(model: Any) -> list[Any]:
    """The classification heads of a classifier; none of another model."""
    named = model.named_modules() if is_classifier(model) else ()
    return [module for name, module in named if name.rsplit(".", 1)[-1] in HEADS]


def _untie(model: Any, head: Any) -> None:
    shared = {id(p) for module in model.modules() if module is not head for p in module.parameters(recurse=False)}
    for name, parameter in list(head.named_parameters(recurse=False)):
        if id(parameter) in shared:
            setattr(head, name, nn.Parameter(parameter.detach().clone()))
            model.config.tie_word_embeddings = False


def _in_fp32(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if torch.is_tensor(x) else x for x in inputs)
