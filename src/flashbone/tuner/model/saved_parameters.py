"""Single parameters of RWKV models that adapters train whole (`parameters_to_save`), such as RWKV-6's time_decay.

A SavedParameter takes the parameter's place in its module, which reads its parameters with `rwkv.layers.read`. To PEFT
it is a tuner layer, so PEFT activates, trains, casts, saves and loads the values.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flashbone.errors import ConfigError, NonFiniteError
from flashbone.rwkv.layers import RwkvHalf
from flashbone.tuner.hosts import offloading
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.layers.mixed_batch import RowNames
from flashbone.tuner.layers.parameters import ParamWrapper
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.keys import VALUE, bare
from flashbone.tuner.model.targets import TargetError


class SavedParameter(nn.Module, BaseTunerLayer):
    """A parameter with a value of its own in each adapter, in the adapter's dtype; a call returns the current one.

    One adapter at a time can set it. A merge always keeps the base's value, since nothing could compute it back.
    """

    adapter_layer_names = (VALUE,)
    other_param_names = ("all_adapters",)
    base_layer: nn.Parameter  # a name that PEFT knows

    def __init__(self, parameter: nn.Parameter, name: str) -> None:
        super().__init__()
        self.name = name
        self._parameters["base_layer"] = parameter  # setattr would move it to meta while PEFT loads the fast way
        self.bone_value = nn.ParameterDict()
        self.all_adapters: dict[str, None] = {}  # of the model: PEFT then activates the same next one in all layers
        self.merged_adapters: list[str] = []
        self.row_names: RowNames | None = None  # set during a call with adapter_names
        self._original: Tensor | None = None  # the base's value while an adapter is merged

    def add(self, adapter_name: str, is_trained: bool, on_meta: bool) -> None:
        """Add an adapter; its value starts as the base's."""
        base = self.base_layer.detach()
        start = torch.empty_like(base, device="meta") if on_meta else base.clone(memory_format=torch.contiguous_format)
        self.bone_value[adapter_name] = nn.Parameter(start, requires_grad=is_trained)

    def forward(self) -> Tensor:
        """The active adapter's value in the base's dtype, or the base's."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        holder = self.holder(self.active_adapters)
        if holder is None or self._disable_adapters or self.merged or self.row_names is not None:
            return self.base_layer
        value: Any = self.bone_value._parameters.get(holder)
        if not offloading.is_simply_there(value):
            value = offloading.for_autograd(self.bone_value, holder, self)
        return value.to(self.base_layer.dtype)

    def holder(self, adapter_names: list[str]) -> str | None:
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

    def check_rows(self, adapter_names: list[str]) -> None:
        """
        Raises:
            ConfigError: one of the adapters in a mixed batch has a value, which would be one for all rows.
        """
        for name in adapter_names:
            if name in self.bone_value:
                raise ConfigError(
                    f"adapter_names: adapter {name!r} has a value of its own for {self.name} (parameters_to_save),"
                    " which is one for all rows of a batch; run one batch for each adapter, with set_adapter"
                )

    def check_merge(self, adapter_names: list[str] | None, must_be_finite: bool) -> None:
        """Find out whether these adapters (None: the active ones) can be merged.

        Raises:
            ConfigError: several of them, or of those that are merged, have a value; or a host shards or offloads it.
            NonFiniteError: `must_be_finite`, and the value holds NaN or infinity.
        """
        name = self.holder([*self.merged_adapters, *(self.active_adapters if adapter_names is None else adapter_names)])
        if name is not None and (offloading.comes_and_goes(self) or offloading.comes_and_goes(self.bone_value)):
            raise ConfigError(
                f"{self.name}: it is sharded or offloaded, so an adapter's value (parameters_to_save) cannot be merged"
                " into it; merge the files with `flashbone merge`"
            )
        if name is not None and must_be_finite and not self.bone_value[name].to(self.base_layer.dtype).isfinite().all():
            raise NonFiniteError(f"{self.name}: adapter {name!r}: its value holds NaN or infinity; nothing was changed")

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make an adapter's value the parameter's own; arguments and errors as those of `check_merge`."""
        self.check_merge(adapter_names, safe_merge)
        name = self.holder(self.active_adapters if adapter_names is None else adapter_names)
        if name is not None and not self.merged:
            self._original, base = self.base_layer.data, self.base_layer
            base.data = self.bone_value[name].to(base.device, base.dtype, copy=True)
            self.merged_adapters = [name]

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the parameter the base's value again, bit for bit."""
        if self._original is not None:
            self.base_layer.data = self._original.to(self.base_layer.device, self.base_layer.dtype)
        self._original, self.merged_adapters = None, []

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook; the value keeps its dtype."""
        if adapter_name in self.bone_value and not self.bone_value[adapter_name].is_meta:
            value = self.bone_value[adapter_name]
            value.data = value.data.to(self.base_layer.device if device is None else device)

    def extra_repr(self) -> str:
        return f"{self.name!r}, {', '.join(self.bone_value)}"


def find(model: nn.Module) -> list[SavedParameter]:
    """All in a model, in its order."""
    return [saved for _, _, saved in _places(model)]


def _places(model: nn.Module) -> list[tuple[str, RwkvHalf, SavedParameter]]:
    """Name in its module, module and SavedParameter."""
    children = [(key, half, child) for _, half in _halves(model) for key, child in half.named_children()]
    return [(key, half, child) for key, half, child in children if isinstance(child, SavedParameter)]


def _halves(model: nn.Module) -> list[tuple[str, RwkvHalf]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, RwkvHalf)]


def add_values(model: nn.Module, config: BoneConfig, adapter_name: str, active: list[str], on_meta: bool) -> None:
    """Give an adapter, whose layers are in the model, its values; the config then names the parameters in full.

    Raises:
        TargetError: a name matches no parameter that can be trained by itself.
        ConfigError: a parameter is adapted, sharded or offloaded, or its module is trained whole.
    """
    chosen = _choose(model, config.parameters_to_save or ())
    for name, (half, key) in chosen.items():
        saved = getattr(half, key)
        if not isinstance(saved, SavedParameter):
            _check_free(model, name, half, key)
            saved = SavedParameter(saved, name)
            del half._parameters[key]
            half.add_module(key, saved)
        saved.add(adapter_name, adapter_name in active and not config.inference_mode, on_meta)
    layers = [module for module in model.modules() if isinstance(module, BoneLayer)]
    for saved in find(model):
        saved._active_adapter = list(active)
        saved.all_adapters |= {name: None for layer in layers for name in layer.bone_block}
    for path, half in _halves(model):
        if {"original_module", "modules_to_save"} & set(path.split(".")) and find(half):
            raise ConfigError(
                f"{bare(path)}: it is trained whole (modules_to_save), and so are single parameters of it"
                " (parameters_to_save); leave one out"
            )
    config.parameters_to_save = list(chosen) or config.parameters_to_save


def _choose(model: nn.Module, entries: Collection[str]) -> dict[str, tuple[RwkvHalf, str]]:
    """Full name -> module and name there of each parameter whose name ends in an entry, in the model's order."""
    places = {
        bare(f"{path}.{key}"): (half, key)
        for path, half in _halves(model)
        for key in [*half._parameters, *(key for key, _, _ in _places(half))]
    }
    unknown = sorted(entry for entry in entries if not any(f".{name}".endswith(f".{entry}") for name in places))
    if unknown:
        endings = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in places))
        raise TargetError(
            f"parameters_to_save: no parameter {', '.join(map(repr, unknown))} of this {type(model).__name__} can be"
            f" trained by itself, {f'only {endings}' if endings else 'as in RWKV models of flashbone'};"
            " modules_to_save trains whole modules"
        )
    ends = tuple(f".{entry}" for entry in entries)
    return {name: place for name, place in places.items() if f".{name}".endswith(ends)}


def _check_free(model: nn.Module, name: str, half: RwkvHalf, key: str) -> None:
    """
    Raises:
        ConfigError: an adapter shifts the parameter, or a host takes it away between calls.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    if any(wrapper.get_base_layer() is half and wrapper.parameter_name == key for wrapper in wrappers):
        raise ConfigError(f"parameters_to_save: {name}: it is adapted (target_parameters); leave one out")
    if offloading.comes_and_goes(half):
        raise ConfigError(
            f"parameters_to_save: {name}: it is sharded or offloaded; add the adapter to a model that is whole and in"
            " memory, or leave it out"
        )


def forget(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter's values; a parameter for which no other adapter has one is plain again."""
    for key, half, saved in _places(model):
        if adapter_name in saved.all_adapters:
            saved.delete_adapter(adapter_name)
        if not saved.bone_value and not offloading.comes_and_goes(saved):
            _make_plain(key, half, saved)


def unload(model: nn.Module, merge: bool, adapter_names: list[str] | None) -> None:
    """Make all parameters plain again; with `merge` they get these adapters' values (None: the active ones').

    Raises:
        ConfigError: a host has sharded or offloaded a parameter since; nothing was changed.
    """
    places = _places(model)
    for _, _, saved in places:
        if offloading.comes_and_goes(saved):
            raise ConfigError(
                f"{saved.name}: it was sharded or offloaded while an adapter had a value for it (parameters_to_save)"
                " and cannot be unloaded; save the adapter, and load it into a model that is whole"
            )
    for key, half, saved in places:
        if merge:
            saved.merge(adapter_names=adapter_names)
        _make_plain(key, half, saved)


def _make_plain(key: str, half: RwkvHalf, saved: SavedParameter) -> None:
    del half._modules[key]
    half._parameters[key] = saved.base_layer
