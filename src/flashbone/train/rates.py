"""Learning rates by group: `training.learning_rates`, patterns of names with the rate of what they match."""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from flashbone.errors import ConfigError
from flashbone.files import patterns

log = logging.getLogger(__name__)
FIELD = "training.learning_rates"


def check_rates(rates: Mapping[str, float]) -> None:
    """Raise ConfigError that names every pattern that cannot be read and every rate out of range."""
    wrong = [f"{name!r} is {why}" for name in rates if (why := patterns.problem(name, is_key=True))]
    wrong += [
        f"{name!r}: got {rate}, wanted 0 or more"
        for name, rate in rates.items()
        if not (math.isfinite(rate) and rate >= 0)
    ]
    if wrong:
        raise ConfigError(f"{FIELD}: {'; '.join(wrong)}")


def set_rates(trainer: Any, rates: Mapping[str, float]) -> None:
    """Have the trainer's optimiser learn each group at its own rate; the schedule applies to all of them.

    Args:
        trainer: Its model has its adapter.
        rates: By patterns: a name, some parts of it, or a regular expression for these. The first that matches decides.

    Raises:
        ConfigError: a pattern matches nothing that is trained, or only what an earlier one has.
    """
    groups: dict[str, int] = dict.fromkeys([*rates, ""], 0)
    for name, parameter in trainer.model.named_parameters():
        groups[_pattern_of(name, rates)] += parameter.numel() if parameter.requires_grad else 0
    if empty := [pattern for pattern in rates if not groups[pattern]]:
        raise ConfigError(
            f"{FIELD}: {', '.join(map(repr, empty))} matches no trained parameter, or only those of a pattern before;"
            " give the name of an adapted layer or of one in adapter.modules_to_save, or a part of it"
        )
    said = [f"{rate:g} for {pattern} ({groups[pattern]:,} parameters)" for pattern, rate in rates.items()]
    said += [f"{trainer.args.learning_rate:g} for all others ({groups['']:,})"] if groups[""] else []
    log.info("learning rates: %s", ", ".join(said))
    make = trainer.create_optimizer

    @functools.wraps(make)
    def create_optimizer(model: Any = None) -> Any:
        if trainer.optimizer is not None:
            return make(model)
        named = (trainer.model if model is None else model).named_parameters()  # sharded ones are others than above
        by_pattern = {parameter: pattern for name, parameter in named if (pattern := _pattern_of(name, rates))}
        optimizer = make(model)
        _regroup(optimizer, {parameter: rates[pattern] for parameter, pattern in by_pattern.items()})
        return optimizer

    trainer.create_optimizer = create_optimizer


def _pattern_of(name: str, rates: Mapping[str, float]) -> str:
    """The first pattern that matches whole parts of a parameter's name, one after the other; empty if none does."""
    return next((p for p in rates if patterns.fullmatch(rf"(?:.*\.)?(?:{p})(?:\..*)?", name)), "")


def _regroup(optimizer: Any, rates: Mapping[Any, float]) -> None:
    """Give parameters with a rate of their own groups of their own, with the other settings of their present ones."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{FIELD}: {type(optimizer).__name__} has no groups of parameters; leave it out")
    for group in list(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        apart = [parameter for parameter in group["params"] if parameter in rates]
        group["params"] = [parameter for parameter in group["params"] if parameter not in rates]
        for rate in dict.fromkeys(rates[parameter] for parameter in apart):
            members = [parameter for parameter in apart if rates[parameter] == rate]
            optimizer.add_param_group({**settings, "params": members, "lr": rate})
