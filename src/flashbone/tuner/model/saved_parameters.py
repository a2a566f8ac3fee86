"""Single parameters of RWKV models that adapters train whole (`parameters_to_save`), such as RWKV-6's time_decay.

A SavedParameter takes the parameter's place in its module, which reads its parameters with `rwkv.layers.read`. To PEFT
it is a tuner layer, so PEFT activates, trains, casts, saves, loads and unloads the values.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flashbone.errors import ConfigError, NonFiniteError
from flashbone.rwkv import time_state
from flashbone.rwkv.layers import RwkvHalf
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.layers.merged_base import check_loadable, check_not_written, fingerprint
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.keys import VALUE, bare
from flashbone.tuner.model.targets import TargetError

_INSIDE_OTHERS = {"base_layer", "original_module", "modules_to_save"}


class SavedParameter(nn.Module, BaseTunerLayer):
    """A parameter with a value of its own in each adapter, in the adapter's dtype; a call returns the current one.

    One adapter at a time can set it. A merge always keeps the base's value, since nothing could compute it back.
    """

    adapter_layer_names = (VALUE,)
    other_param_names = ("all_adapters",)
    base_layer: nn.Parameter  # PEFT's name for what it gives back on unloading

    def __init__(self, parameter: nn.Parameter, name: str) -> None:
        super().__init__()
        self.name = name
        self._parameters["base_layer"] = parameter  # setattr would move it to meta while PEFT loads the fast way
        self.bone_value = nn.ParameterDict()
        self.all_adapters: dict[str, None] = {}  # of the model: PEFT then activates the same next one in all layers
        self.merged_adapters: list[str] = []
        self._original: Tensor | None = None  # the base's value while an adapter is merged
        self.merged_bits: Any = None

    def forward(self) -> Tensor:
        """The active adapter's value in the base's dtype, or the base's."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        name = None if self._disable_adapters or self.merged else self.holder(self.active_adapters)
        if name is None:
            return self.base_layer
        value: Any = self.bone_value._parameters.get(name)
        if not offloading.is_materialized(value):
            value = offloading.for_autograd(self.bone_value, name, self)
        return value.to(self.base_layer.dtype)

    def holder(self, adapter_names: Collection[str]) -> str | None:
        """The adapter among these that has a value.

        Raises:
            ConfigError: more than one has.
        """
        holders = [name for name in dict.fromkeys(adapter_names) if name in self.bone_value]
        if len(holders) > 1:
            raise ConfigError(
                f"adapters {' and '.join(map(repr, holders))} each have a value of their own for {self.name}"
                " (parameters_to_save), and it can have one; use one of them at a time"
            )
        return holders[0] if holders else None

    def check_merge(self, adapter_names: Collection[str] | None, must_be_finite: bool) -> str | None:
        """The adapter among these (None: the active ones), and those that are merged, that has a value.

        Raises:
            ConfigError: several have, a host shards or offloads the parameter, or see `check_not_written`.
            NonFiniteError: `must_be_finite`, and the value holds NaN or infinity.
        """
        name = self.holder([*self.merged_adapters, *(self.active_adapters if adapter_names is None else adapter_names)])
        if name is None:
            return None
        check_not_written(self)
        if offloading.is_sharded_or_offloaded(self) or offloading.is_sharded_or_offloaded(self.bone_value):
            raise ConfigError(
                f"{self.name}: it is sharded or offloaded, so an adapter's value (parameters_to_save) cannot be merged"
                " into it; merge the files with `flashbone merge`"
            )
        if must_be_finite and not self.bone_value[name].to(self.base_layer.dtype).isfinite().all():
            raise NonFiniteError(f"{self.name}: adapter {name!r}: its value holds NaN or infinity; nothing was changed")
        return name

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make an adapter's value the parameter's own; arguments and errors as those of `check_merge`."""
        name, base = self.check_merge(adapter_names, safe_merge), self.base_layer
        if name is not None and not self.merged:
            self._original, self.merged_adapters = base.data, [name]
            base.data = self.bone_value[name].to(base.device, base.dtype, copy=True)
            self.merged_bits = fingerprint(base)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the parameter the base's value again, bit for bit; see `check_not_written` for its error."""
        self.check_unmerge()
        if self._original is not None:
            self.base_layer.data = self._original.to(self.base_layer.device, self.base_layer.dtype)
        self._original, self.merged_adapters = None, []

    def check_unmerge(self) -> None:
        check_not_written(self)

    def base_parameter(self) -> nn.Parameter:
        return self.base_layer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        check_loadable(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook; the value keeps its dtype."""
        if adapter_name in self.bone_value and not self.bone_value[adapter_name].is_meta:
            value = self.bone_value[adapter_name]
            value.data = value.data.to(self.base_layer.device if device is None else device)


def find(model: nn.Module) -> list[SavedParameter]:
    """All in a model, in its order."""
    return [module for module in model.modules() if isinstance(module, SavedParameter)]


def add_values(model: nn.Module, config: BoneConfig, adapter_name: str, active: list[str], on_meta: bool) -> None:
    """Give an adapter, whose layers are in the model, its values, which start as the base's; the config then names the
    parameters in full.

    Raises:
        TargetError: a name matches no parameter that can be trained by itself.
        ConfigError: a module with such a parameter is adapted, trained whole, sharded or offloaded.
    """
    chosen = _choose(model, config.parameters_to_save or ())
    for name, (half, key) in chosen.items():
        if key in half._parameters:
            half.add_module(key, SavedParameter(half._parameters.pop(key), name))  # pyright: ignore[reportArgumentType]
        saved: Any = half._modules[key]
        base = saved.base_layer.detach()
        start = torch.empty_like(base, device="meta") if on_meta else base.clone(memory_format=torch.contiguous_format)
        is_trained = adapter_name in active and not config.inference_mode
        saved.bone_value[adapter_name] = nn.Parameter(start, requires_grad=is_trained)
    layers = [module for module in model.modules() if isinstance(module, BoneLayer)]
    for path, half in _halves(model):
        for saved in find(half):
            saved._active_adapter = list(active)
            saved.all_adapters |= {name: None for layer in layers for name in layer.bone_block}
            if not _INSIDE_OTHERS.isdisjoint(path.split(".")):
                raise ConfigError(
                    f"{saved.name}: an adapter trains it whole (parameters_to_save), and its module is adapted"
                    " (target_parameters) or trained whole (modules_to_save); leave one out"
                )
    config.parameters_to_save = list(chosen) or config.parameters_to_save


def _halves(model: nn.Module) -> list[tuple[str, RwkvHalf]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, RwkvHalf)]


def _choose(model: nn.Module, entries: Collection[str]) -> dict[str, tuple[RwkvHalf, str]]:
    """Full name -> module and name there of each parameter whose name ends in an entry, in the model's order."""
    if any(entry.rpartition(".")[2] == time_state.NAME for entry in entries):
        time_state.add(model)
    places = {
        bare(f"{path}.{key}"): (half, key)
        for path, half in _halves(model)
        for key, child in [*half._parameters.items(), *half._modules.items()]
        if isinstance(child, (nn.Parameter, SavedParameter))
    }
    unknown = sorted(entry for entry in entries if not any(f".{name}".endswith(f".{entry}") for name in places))
    if unknown:
        endings = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in places))
        raise TargetError(
            f"parameters_to_save: no parameter {', '.join(map(repr, unknown))} of this {type(model).__name__} can be"
            f" trained by itself, {f'only {endings}' if endings else 'as in RWKV models of flashbone'};"
            " modules_to_save trains whole modules, and flashbone merge takes files that hold other parameters"
        )
    ends = tuple(f".{entry}" for entry in entries)
    chosen = {name: place for name, place in places.items() if f".{name}".endswith(ends)}
    if away := [name for name, (half, _) in chosen.items() if offloading.is_sharded_or_offloaded(half)]:
        raise ConfigError(
            f"parameters_to_save: {away[0]}: it is sharded or offloaded; add the adapter to a model that is whole and"
            " in memory, or leave it out"
        )
    return chosen


def forget(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter's values; a parameter for which no other adapter has one is plain again."""
    for _, half in _halves(model):
        for key, saved in list(half.named_children()):
            if not isinstance(saved, SavedParameter):
                continue
            if adapter_name in saved._all_available_adapter_names():
                saved.delete_adapter(adapter_name)
            if not saved.bone_value:
                del half._modules[key]
                half._parameters[key] = saved.base_layer
    time_state.drop(model)
