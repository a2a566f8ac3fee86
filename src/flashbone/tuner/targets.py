"""Which modules an adapter goes to, and what to say when a name matches none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from flashbone.tuner.layer import BoneLayer, unsupported_reason

MAX_SUGGESTIONS = 8


def adaptable_modules(model: nn.Module) -> list[str]:
    """Names of the modules that the family can adapt, in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if name and ".base_layer" not in name and (isinstance(module, BoneLayer) or unsupported_reason(module) is None)
    ]


def nearest_names(model: nn.Module, wanted: Iterable[str] | str | None) -> list[str]:
    """The last parts of adaptable modules' names, those most like the wanted ones first."""
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in adaptable_modules(model)))
    asked = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    near = [
        match
        for name in asked
        for match in difflib.get_close_matches(name.rpartition(".")[2], endings, n=3, cutoff=0.5)
    ]
    return list(dict.fromkeys([*near, *endings]))[:MAX_SUGGESTIONS]
