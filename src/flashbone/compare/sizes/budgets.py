"""The budget: how many parameters an adapter may train, as a number or as that of a method at a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashbone.compare.methods.registry import get
from flashbone.compare.sizes.counting import Counter
from flashbone.compare.sizes.matching import describe, is_fixed
from flashbone.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """Parameters that an adapter may train, and where the number comes from: "bone, r = 32", or "" for a number."""

    parameters: int
    origin: str


def budget_of(
    spec: Mapping[str, Any] | int,
    build_model: Callable[[], Any],
    target_modules: list[str] | str | None,
    task_type: str | None,
) -> Budget:
    """The budget that is meant.

    Args:
        spec: A number of parameters; or a method with its settings, such as {"method": "bone", "r": 32}.
        build_model: As for `match`.
        target_modules: As for `match`.
        task_type: As for `match`.

    Raises:
        ConfigError: the number is not positive, there is no such method, it is a bound, or its size is left open.
    """
    if isinstance(spec, int) and not isinstance(spec, bool):
        if spec < 1:
            raise ConfigError(f"budget: got {spec}, wanted a positive number of parameters")
        return Budget(spec, "")
    if not isinstance(spec, Mapping) or "method" not in spec:
        raise ConfigError(
            f"budget: got {spec!r}, wanted a number of parameters, or a method and its size, such as"
            " {method: bone, r: 32}"
        )
    try:
        method = get(str(spec["method"]))
        settings = {name: value for name, value in spec.items() if name != "method"}
        if method.is_bound:
            raise ConfigError(f"{method.name} is a bound and has no adapter; name an adapter")
        if not is_fixed(method, settings):
            raise ConfigError(f"{method.name}: its size is missing; say {method.size_fields[0]}")
        count = Counter(method, build_model, target_modules, task_type, settings)(None)
    except ConfigError as error:
        raise ConfigError(f"budget: {error}") from error
    return Budget(count.adapter, f"{method.name}, {describe(method, settings)}")
