"""SavedParameter: one parameter of a module with a whole value of its own in each adapter, such as RWKV-6's time_decay.

It stands in for the parameter and gives the value of the active adapter, or the base's, so that this is seen wherever
the parameter is read; and PEFT finds a tuner layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flashbone.errors import ConfigError, NonFiniteError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.mixed_batch import RowNames
from flashbone.tuner.model import stand_ins

VALUES = "bone_parameter"
_WRAPPERS = re.compile(r"(?:^|\.)(?:base_layer|original_module|_orig_mod|_fsdp_wrapped_module)(?=\.|$)")
_LIVE_NAME = re.compile(rf"(^|\.){stand_ins.PREFIX}([^.]+)(?:\.{VALUES}(?:\.[^.]+)?)?$")


class SavedParameter(nn.Module, BaseTunerLayer):
    """A parameter of `module`, and the value that each adapter has for it, which starts as the base's.

    Values are kept in the adapter's dtype and seen in the base's. One adapter at a time can say what the parameter is.
    A merge always keeps the base's value, which nothing could compute back.
    """

    adapter_layer_names = (VALUES,)
    other_param_names = ("bone_others",)
    bias: Any = None  # PEFT trains the biases of tuner layers, and would look for one here

    def __init__(self, module: nn.Module, key: str, name: str) -> None:
        """`key` is the parameter's name in the module, `name` that in the bare model."""
        super().__init__()
        self.name, self.key = name, key
        self._place = (module,)  # in a tuple: it is no child
        siblings = [child for child in module.children() if isinstance(child, SavedParameter)]
        self._order = siblings[0]._order if siblings else list(module._parameters)
        self.bone_parameter = nn.ParameterDict()
        self.bone_others: dict[str, None] = {}  # all adapters of the model: deleting one makes the same next one active
        self.merged_adapters: list[str] = []
        self.row_names: RowNames | None = None  # set for the time of a call of the model with adapter_names
        self._kept: Tensor | None = None
        self.base_layer = _Base()
        self.attach()

    @property
    def owner(self) -> nn.Module:
        """Whose parameter it is."""
        return self._place[0]

    def attach(self) -> None:
        """Take the parameter's place in its module."""
        # Not by setattr: PEFT makes adapters where every new parameter goes to the meta device.
        self.base_layer._parameters["original"] = stand_ins.put(self.owner, self.key, self)

    def detach(self) -> None:
        """Give the parameter back to its module: the same object, in its old place among the others.

        Raises:
            ConfigError: somebody has changed the module's class since.
        """
        self.check_detachable()
        stand_ins.take_away(self.owner, self.key, self.base_layer.original, self._order)

    def check_detachable(self) -> None:
        """
        Raises:
            ConfigError: see `detach`.
        """
        if self.key not in stand_ins.keys(self.owner):
            raise ConfigError(
                f"{self.name}: it is kept by an adapter (parameters_to_save), and its module became"
                f" {type(self.owner).__name__} since, by fully_shard or a parametrisation; change adapters before that"
            )

    def update(self, adapter_name: str, is_trained: bool, on_meta: bool) -> None:
        """Add an adapter; its value starts as the base's."""
        offloading.stop_offloading(self.bone_parameter)
        base = self.base_layer.original.detach()
        base = base if self._kept is None else self._kept.to(base.device, base.dtype)
        start = torch.empty_like(base, device="meta") if on_meta else base.clone(memory_format=torch.contiguous_format)
        self.bone_parameter[adapter_name] = nn.Parameter(start, requires_grad=is_trained)

    def copy_value(self, source: str, target: str) -> None:
        """Give one adapter the value of another; nothing if one of them has none."""
        if source in self.bone_parameter and target in self.bone_parameter:
            self.bone_parameter[target].data = self.bone_parameter[source].detach().clone()

    def forward(self) -> Tensor:
        """What the parameter is now, in the base's dtype."""
        original = self._there(self.base_layer, "original")
        name = self._acting()
        return original if name is None else self._there(self.bone_parameter, name).to(original.dtype)

    def _acting(self) -> str | None:
        """The adapter whose value it is.

        Raises:
            ConfigError: more than one could say, or the rows of a batch have adapters of their own.
        """
        if self.row_names is not None and not self._disable_adapters:
            self._check_rows(self.row_names)
            return None
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.bone_parameter]
        self.check_alone(names)
        return names[0] if names else None

    def _check_rows(self, rows: RowNames) -> None:
        if self.merged_adapters:
            raise ConfigError("adapter_names: adapters stand merged, so that no row can be without; unmerge them first")
        if holders := [name for name in dict.fromkeys(rows.names) if name in self.bone_parameter]:
            raise ConfigError(
                f"adapter_names: adapter {holders[0]!r} has a value of its own for {self.name} (parameters_to_save),"
                " which is one for all rows of a batch; run one batch for each adapter, with set_adapter"
            )

    def check_alone(self, adapter_names: list[str]) -> None:
        """
        Raises:
            ConfigError: more than one of these adapters has a value for the parameter.
        """
        holders = [name for name in dict.fromkeys(adapter_names) if name in self.bone_parameter]
        if len(holders) > 1:
            raise ConfigError(
                f"adapters {' and '.join(map(repr, holders))} each have a value of their own for {self.name}"
                " (parameters_to_save), and it can have one; use one of them at a time"
            )

    def _there(self, holder: nn.Module, key: str) -> Tensor:
        found: Any = holder._parameters.get(key)
        if offloading.is_materialized(found):
            return found
        if found is not None and offloading.is_sharded(found):
            raise ConfigError(
                f"{self.name}: a single parameter that adapters keep (parameters_to_save) cannot be read from shards of"
                " FSDP2 or ZeRO-3; take it out of parameters_to_save, or train without sharding"
            )
        return offloading.for_autograd(holder, key, self)

    def check_merge(self, adapter_names: list[str] | None, must_be_finite: bool) -> None:
        """Find out, without changing anything, whether these adapters (None: the active ones) can be merged.

        Raises:
            ConfigError: several of them, or of those that stand merged, have a value; or a host takes the base's away.
            NonFiniteError: `must_be_finite`, and it would hold NaN or infinity.
        """
        names = self._to_merge(adapter_names)
        self.check_alone([*self.merged_adapters, *names])
        if names and offloading.is_sharded_or_offloaded(self.base_layer):
            raise ConfigError(
                f"{self.name}: it is sharded or offloaded, so that no adapter's value (parameters_to_save) can be put"
                " in its place; merge the files with `flashbone merge`"
            )
        if names and must_be_finite and not self._as_base(names[0]).isfinite().all():
            raise NonFiniteError(
                f"{self.name}: adapter {names[0]!r}: its value holds NaN or infinity; nothing was changed"
            )

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in dict.fromkeys(names) if n in self.bone_parameter and n not in self.merged_adapters]

    def _as_base(self, name: str) -> Tensor:
        base = self.base_layer.original
        return self.bone_parameter[name].detach().to(base.device, base.dtype, copy=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make an adapter's value the parameter's own; arguments and errors as those of `check_merge`."""
        self.check_merge(adapter_names, safe_merge)
        for name in self._to_merge(adapter_names):
            self._kept = self.base_layer.original.data.to("cpu")
            self.base_layer.original.data = self._as_base(name)
            self.merged_adapters = [name]

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the parameter the base's value again, bit for bit."""
        if self._kept is not None:
            base = self.base_layer.original
            base.data = self._kept.to(base.device, base.dtype)
        self._kept, self.merged_adapters = None, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook; the value keeps its dtype."""
        if adapter_name in self.bone_parameter and not self.bone_parameter[adapter_name].is_meta:
            value, base = self.bone_parameter[adapter_name], self.base_layer.original
            target = offloading.execution_device(self.base_layer) or base.device if device is None else device
            value.data = value.data.to(target)

    def extra_repr(self) -> str:
        return f"{self.name!r}, {', '.join(self.bone_parameter)}"


class _Base(nn.Module):
    """Holds the base's parameter. In `base_layer`, since PEFT takes all else in a tuner layer for the adapter's."""

    original: Any


def find(model: nn.Module) -> list[SavedParameter]:
    """All in a model, in its order."""
    return [module for module in model.modules() if isinstance(module, SavedParameter)]


def forget(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter's values; a parameter for which no other adapter has one is plain again."""
    for saved in find(model):
        if adapter_name in saved._all_available_adapter_names():
            saved.delete_adapter(adapter_name)
        if not saved.bone_parameter and not offloading.is_sharded_or_offloaded(saved.base_layer):
            saved.detach()


def unload(model: nn.Module, merge: bool, adapter_names: list[str] | None) -> None:
    """Make all parameters plain again; with `merge` they get these adapters' values (None: the active ones').

    Raises:
        ConfigError: a host has taken a parameter since, by its name in an adapter; nothing was changed.
    """
    found = find(model)
    for saved in found:
        saved.check_detachable()
        if offloading.is_sharded_or_offloaded(saved.base_layer):
            raise ConfigError(
                f"{saved.name}: it was sharded or offloaded while an adapter kept it (parameters_to_save), and cannot"
                " be made plain again there; save the adapter, and load it into a model that is whole"
            )
    for saved in found:
        if merge:
            saved.merge(adapter_names=adapter_names)
        saved.detach()


@contextmanager
def put_aside(model: nn.Module) -> Iterator[list[SavedParameter]]:
    """Within the block the model has its plain parameters, so that PEFT sees modules as they are; then those that have
    adapters are back.

    Raises:
        ConfigError: somebody has changed a module's class; nothing is put aside.
    """
    found = find(model)
    for saved in found:
        saved.check_detachable()
    for saved in found:
        saved.detach()
    try:
        yield found
    finally:
        for saved in found:
            if saved.bone_parameter or offloading.is_sharded_or_offloaded(saved.base_layer):
                saved.attach()


def bare(name: str) -> str:
    """A name without what adapters and hosts put into it."""
    return _LIVE_NAME.sub(r"\1\2", _WRAPPERS.sub("", name).removeprefix("."))
