"""ParamWrapper: single parameters of a module with adapters, such as the fused experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from flashbone.errors import ConfigError, ShapeError
from flashbone.tuner.layers.conv import CONVOLUTIONS
from flashbone.tuner.layers.kinds import BaseKind, with_article
from flashbone.tuner.layers.layer import BoneLayer, BoneLinear
from flashbone.tuner.layers.shifts import adapters_to_apply, call_shifted, shifted_parameter
from flashbone.variants import Variant
from flashbone.variants.stacked import PerExpert


@dataclass(frozen=True)
class ParameterKind(BaseKind):
    """A parameter (out, in) or (experts, out, in); `is_transposed`: (experts, in, out)."""

    parameter_name: str = "weight"
    is_transposed: bool = False

    def sizes(self, module: Any) -> tuple[int, int]:
        *_, rows, columns = shape_of(self.parameter(module))
        return (columns, rows) if self.is_transposed else (rows, columns)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT if self.is_transposed else stored

    def stored(self, W: Tensor, module: Any) -> Tensor:
        return W.mT if self.is_transposed else W


class ParamWrapper(BoneLinear):
    """A module with adapters on one of its parameters, which is shifted while the module runs and when it is read.

    PEFT looks for wrappers by this class name. Wrappers of several parameters of one module are nested; all other
    attributes come from the module.
    """

    converts_to_lora = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, **fields: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, **fields)

    def _kind_of(self, base: nn.Module) -> BaseKind:
        shape = shape_of(getattr(base, self.parameter_name))
        if len(shape) not in (2, 3):
            raise ShapeError(f"it has the shape {tuple(shape)}; wanted (out, in) or (experts, out, in); leave it out")
        self.experts = shape[0] if len(shape) == 3 else None
        return ParameterKind(self.parameter_name, len(shape) == 3 and bool(getattr(base, "is_transposed", False)))

    def _checked_variant(self, variant: Variant, dropout: float) -> Variant:
        if dropout:
            raise ConfigError(
                f"dropout={dropout} cannot be applied to a parameter, whose input is unknown; use dropout=0, or"
                " give target_parameters an adapter of their own"
            )
        return variant if self.experts is None else PerExpert(variant, self.experts)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        parameter = self.base_parameter()
        return parameter.device, parameter.dtype

    def __getattr__(self, name: str) -> Any:
        if "base_layer" not in self.__dict__.get("_modules", ()) or name == "parameter_name":
            return super().__getattr__(name)
        if name == self.parameter_name and (names := adapters_to_apply(self)):
            return shifted_parameter(self, names)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the shifted parameter."""
        return call_shifted(self, adapters_to_apply(self), args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare module; nested wrappers and adapted layers inside it are unloaded, too."""
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if isinstance(self.base_layer, BoneLayer):
            return self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for name, layer in list(base.named_modules()):
            if isinstance(layer, BoneLayer):
                parent, _, child = name.rpartition(".")
                bare = layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                setattr(base.get_submodule(parent), child, bare)
        return base

    def extra_repr(self) -> str:
        return f"{self.parameter_name!r}, {super().extra_repr()}"


def shape_of(parameter: Any) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def why_not_parameter(module: nn.Module, name: str) -> str | None:
    """Why this parameter cannot be named in `target_parameters`; None if it can."""
    kind = type(module).__name__
    if isinstance(module, nn.RNNBase):
        return f"{with_article(kind)} keeps a second copy of its weights, which a shift does not reach; leave it out"
    is_layer = isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or kind == "Conv1D"
    if is_layer and name == "weight":
        return f"it is the weight of {with_article(kind)}, which target_modules adapts; name the layer there"
    return None


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, module and short name of each matrix or stack of matrices among the base's parameters."""
    wrappers = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    for name, module in model.named_modules():
        if ".bone_block" in f".{name}":
            continue
        bare_name = without_wrappers(name, wrappers)
        for short, parameter in module.named_parameters(recurse=False):
            if len(shape_of(parameter)) in (2, 3) and bare_name:
                yield f"{bare_name}.{short}", module, short


def without_wrappers(name: str, wrappers: list[str]) -> str:
    """A module's name in the bare model: without the `base_layer` of these wrappers."""
    for wrapper in sorted(wrappers, key=len, reverse=True):
        inside = f"{wrapper}.base_layer"
        if name == inside or name.startswith(f"{inside}."):
            name = wrapper + name.removeprefix(inside)
    return name


def own_name(name: str, layer: BoneLayer, wrappers: list[str]) -> str:
    """The name in the bare model of the module or parameter that a layer adapts."""
    if isinstance(layer, ParamWrapper):
        return f"{without_wrappers(f'{name}.base_layer', wrappers)}.{layer.parameter_name}"
    return without_wrappers(name, wrappers)


def inside_wrappers(model: nn.Module, config: Any) -> tuple[dict[str, str], bool]:
    """The layers that a config names inside modules with adapted parameters, which PEFT skips, each with its name in
    the bare model; and whether the config also names layers elsewhere."""
    wrappers = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    if not wrappers or not config.target_modules:
        return {}, True
    every_linear = str(config.target_modules).lower() == "all-linear"
    inside, outside = {}, False
    for name, module in model.named_modules():
        bare_name = without_wrappers(name, wrappers)
        if not name or ".bone_" in name or isinstance(module, ParamWrapper):
            continue
        base = module.get_base_layer() if isinstance(module, BoneLayer) else module
        if isinstance(base, nn.Linear) if every_linear else check_target_module_exists(config, bare_name):
            if bare_name != name and bare_name not in wrappers and not name.endswith(".base_layer"):
                inside[name] = bare_name
            outside |= bare_name == name
    return inside, outside


def check_targets(model: nn.Module, target_parameters: list[str]) -> list[str]:
    """The problems of `target_parameters`: entries without a match, and matches that cannot be adapted."""
    reasons = {name: why_not_parameter(module, short) for name, module, short in parameters_of(model)}
    problems = []
    for entry in target_parameters:
        matches = [name for name in reasons if f".{name}".endswith(f".{entry}")]
        problems += [f"target_parameters: {name}: {reasons[name]}" for name in matches if reasons[name]]
        if not matches:
            free = dict.fromkeys(".".join(name.split(".")[-2:]) for name, reason in reasons.items() if not reason)
            names = f"it has {', '.join(list(free)[:8])}" if free else "it has none but weights of layers"
            problems.append(f"target_parameters: the model has no matrix or stack of matrices {entry!r}; {names}")
    return problems
