"""What hosts read off an adapted layer: its weight, where others call the layer, and attributes of its base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flashbone.errors import ConfigError
from flashbone.tuner.layers.shifts import adapters_to_apply, shifted_parameter


class ReadWeight:
    """Gives hosts that read the weight `W + sum of scale * delta(W)`, with gradients to the blocks.

    Attributes:
        weight_reader: The class of the host that computes with the weight. Set by `model/weight_reads.py`; None: hosts
            call the layer, and ask its weight for nothing but dtype, device and shape, which the base's has, too.
        is_only_read: Whether that host never calls the layer.
        on_read: Called at each read with what builds the result, and whether that is shifted, while
            `model/acting.py` watches.
    """

    weight_reader: str | None = None
    is_only_read = False
    on_read: Callable[[Callable[[], Any], bool], Any] | None = None

    @property
    def weight(self: Any) -> Any:
        """The base's weight, for hosts that compute with it with all active adapters.

        Raises:
            ConfigError: an adapter has a dropout, the base is quantised, or see `adapters_to_apply`.
        """
        if self.base_kind.parameter_name != "weight":  # the adapters are on another parameter of the module
            return self.base_layer.weight
        names = adapters_to_apply(self) if self.weight_reader is not None else []
        build = functools.partial(_shifted, self, names) if names else functools.partial(_plain, self)
        on_read = self.on_read  # another thread may end the watch
        return build() if on_read is None else on_read(build, bool(names))

    def become_read(self: Any, reader: str, only: bool) -> None:
        """Give the host of this name the shifted weight from now on; `only`: no host calls the layer."""
        self.weight_reader, self.is_only_read = reader, only
        if only:
            self.converts_to_lora = False  # a LoRA is not read


def _plain(layer: Any) -> Any:
    base = layer.get_base_layer()
    return base.qweight if hasattr(base, "qweight") else base.weight  # as PEFT's own property


def _shifted(layer: Any, names: list[str]) -> Any:
    if layer.training:
        check_readable(layer, {name: getattr(layer.bone_dropout[name], "p", 0.0) for name in names})
    if layer.base_kind.is_refetched(layer.get_base_layer()):
        raise ConfigError(_says(layer, "and it is quantised; leave the layer out, or load it unquantised"))
    return shifted_parameter(layer, names)


class BaseAttributes:
    """Gives hosts what they read off the base besides its weight: `stride`, `padding_idx`, fields of a subclass."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue]
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
        return getattr(base, name)


def check_readable(layer: ReadWeight, dropouts: dict[str, float]) -> None:
    """Check that these dropouts can be applied, by adapter, where a host reads the layer's weight.

    Raises:
        ConfigError: one of them is not 0.
    """
    for name, dropout in dropouts.items():
        if dropout:
            outcome = f"so dropout={dropout} of adapter {name!r} cannot be applied"
            raise ConfigError(_says(layer, f"{outcome}; use dropout=0, or put the layer into exclude_modules"))


def _says(layer: ReadWeight, outcome: str) -> str:
    never = " and never calls it" if layer.is_only_read else ""
    return f"{layer.weight_reader} reads the weight of this layer{never}, {outcome}"
