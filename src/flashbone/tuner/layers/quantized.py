"""Base layers with a quantised weight, through PEFT's backends: dequantised to read, requantised by a merge.

A new one: a subclass of QuantizedKind, its entry in `KINDS`, its package in `PACKAGES`; no other file changes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flashbone.errors import ConfigError
from flashbone.tuner.layers.kinds import LINEAR, TRANSPOSED, BaseKind, with_article

# PEFT would import a package to find out whether a layer is from it; no layer is from one that nobody has imported.
PACKAGES = ("bitsandbytes", "hqq", "torchao", "aqlm", "eetq", "gptqmodel", "neural_compressor", "transformer_engine")
_FUSED = ("LayerNormLinear", "LayerNormMLP")  # TransformerEngine's: what they multiply is not what they are given


def _unknown_settings() -> None:
    """In place of the settings of a torchao layer that transformers did not quantise."""


class QuantizedKind(BaseKind):
    """A layer of one of PEFT's quantisation backends. W is dequantised at each read and not kept.

    A merge always keeps the quantised original: recomputing it would quantise twice.
    """

    always_keeps_original = True

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def weight(self, module: Any) -> Tensor:
        """W dequantised, a new tensor.

        Raises:
            ConfigError: the backend cannot.
        """
        if (problem := self.unreadable(module)) is not None:
            raise ConfigError(problem)
        try:
            return self.backend.get_base_weight(module).detach()
        except NotImplementedError as error:  # torchao, for some of its types
            raise ConfigError(f"the base weight cannot be dequantised: {error}") from error

    def is_refetched(self, module: nn.Module) -> bool:
        return True

    def unreadable(self, module: nn.Module) -> str | None:
        return None if self.backend.supports_merge else f"{self.backend.backend_name} layers cannot be dequantised"

    def check_writable(self, module: nn.Module) -> None:
        if (problem := self.unreadable(module)) is not None:
            raise ConfigError(
                f"{problem}, so nothing can be merged into them; keep the adapter apart, or merge it into the"
                " unquantised model (flashbone merge) and quantise that"
            )

    def write(self, module: Any, W: Tensor) -> None:
        """Quantise W with the layer's settings; if that fails, the layer is unchanged."""
        before = self._state(module)
        holder = SimpleNamespace(base_layer=module, get_base_layer=lambda: module)  # as PEFT's layer
        try:
            self.backend.set_base_weight(holder, W.contiguous())
            self._take_over(module, holder.base_layer)
        except BaseException:  # Ctrl-C, too
            self._put(module, before)
            raise

    def hold(self, module: Any) -> Any:
        return self._state(module)

    def keep(self, module: Any) -> Any:
        """The quantised weight in host memory; on the CPU its own storage."""
        return _moved(self._state(module), "cpu")

    def kept_weight(self, module: Any, kept: Any) -> Tensor:
        now = self._state(module)
        self.restore(module, kept)
        try:
            return self.weight(module)
        finally:
            self._put(module, now)

    def restore(self, module: Any, kept: Any) -> None:
        self._put(module, _moved(kept, self.parameter(module).device))

    def _state(self, module: Any) -> dict[str, Any]:
        """The quantised weight: tensors, and the settings for reading them."""
        return {"weight": module.weight}

    def _put(self, module: Any, state: dict[str, Any]) -> None:
        """Set the module's weight to a result of `_state`."""
        weight = state["weight"]
        vars(module).pop("weight", None)  # left by a requantisation that failed
        module.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    def _take_over(self, module: Any, written: Any) -> None:
        """Copy the weight from the layer that the backend wrote to, where that is a new one."""


class TorchaoKind(QuantizedKind):
    """torchao: a `torch.nn.Linear` whose weight is a tensor subclass."""

    def check_writable(self, module: nn.Module) -> None:
        super().check_writable(module)
        if self.backend.get_apply_tensor_subclass is _unknown_settings:
            raise ConfigError(
                "the quantisation settings of this torchao layer are unknown, so nothing can be merged into it;"
                " load the model with transformers' TorchAoConfig"
            )

    def caller(self, module: Any) -> Callable[..., Tensor]:
        """With quantised activations torchao silently returns no gradient of the input; then the gradient goes straight
        through their rounding, as `grad W`."""
        weight = module.weight
        names = ("act_quant_kwargs", "activation_quantization", "input_quant_func")
        if not torch.is_grad_enabled() or all(getattr(weight, name, None) is None for name in names):
            return module
        return lambda x: _straight_through(module, x, lambda: self.weight(module))


class Bnb8bitKind(QuantizedKind):
    """bitsandbytes: the parameter and its attributes; 8-bit layers also have a state, which their calls read."""

    def _state(self, module: Any) -> dict[str, Any]:
        weight, state = module.weight, getattr(module, "state", None)
        state_fields = {} if state is None else dict(vars(state))
        return {"class": type(weight), "data": weight.data, "attributes": dict(vars(weight)), "state": state_fields}

    def _put(self, module: Any, state: dict[str, Any]) -> None:
        weight: Any = torch.Tensor._make_subclass(state["class"], state["data"], False)
        vars(weight).update(state["attributes"])
        module.weight = weight
        if hasattr(module, "quant_state"):
            module.quant_state = weight.quant_state
        if hasattr(module, "state"):
            vars(module.state).clear()
            vars(module.state).update(state["state"])


class Bnb4bitKind(Bnb8bitKind):
    """As 8-bit ones, but never in the layout that bitsandbytes uses on CPUs; see `keep_trainable`."""

    @torch.compiler.disable  # the compiler does not end on bitsandbytes' attributes
    def weight(self, module: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        _unpack(module)
        return super().weight(module)

    def _state(self, module: Any) -> dict[str, Any]:
        _unpack(module)
        return super()._state(module)


class HqqKind(QuantizedKind):
    """HQQ: packed data and a dictionary; the backend writes to a new layer, and these are copied from it."""

    def parameter(self, module: Any) -> Any:
        return module.W_q

    def _state(self, module: Any) -> dict[str, Any]:
        return {"W_q": module.W_q, "meta": module.meta}

    def _put(self, module: Any, state: dict[str, Any]) -> None:
        W_q = state["W_q"]
        module.W_q = W_q if isinstance(W_q, nn.Parameter) else nn.Parameter(W_q, requires_grad=False)
        module.meta = dict(state["meta"])

    def _take_over(self, module: Any, written: Any) -> None:
        self._put(module, self._state(written))


class ForwardOnlyKind(QuantizedKind):
    """GPTQ, AWQ, EETQ, AQLM and others: the layer can be called, not read."""

    def parameter(self, module: Any) -> Any:
        return module


# By the backend's name in PEFT.
KINDS = {
    "bnb 8bit": Bnb8bitKind,
    "bnb 4bit": Bnb4bitKind,
    "hqq": HqqKind,
    "torchao": TorchaoKind,
}


def quantized_kind_of(module: nn.Module, get_apply_tensor_subclass: Any = None) -> QuantizedKind | None:
    """The kind of a quantised layer; None if the layer is not.

    Args:
        module: The layer.
        get_apply_tensor_subclass: How torchao requantises, from the model's quantisation config.
    """
    if not any(name in sys.modules for name in PACKAGES):
        return None
    settings = get_apply_tensor_subclass or _unknown_settings
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=settings)
    return None if backend is None else KINDS.get(backend.backend_name, ForwardOnlyKind)(backend)


def linear_kind(module: nn.Module, get_apply_tensor_subclass: Any = None) -> BaseKind:
    """How a linear layer, quantised or not, stores its weight; arguments as of `quantized_kind_of`.

    Raises:
        ConfigError: the family cannot adapt the module as a linear layer.
    """
    if (problem := linear_problem(module)) is not None:
        raise ConfigError(f"a Bone adapter cannot be put on this layer: {problem}")
    quantized = quantized_kind_of(module, get_apply_tensor_subclass)
    return quantized or (TRANSPOSED if isinstance(module, Conv1D) else LINEAR)


def linear_problem(module: nn.Module) -> str | None:
    """Why the family cannot adapt a module as a linear layer, quantised or not; None if it can."""
    kind = type(module).__name__
    if quantized_kind_of(module) is None:
        if isinstance(module, (nn.Linear, Conv1D)):
            return None
        supported = "only torch.nn.Linear and transformers' Conv1D are supported"
        return f"it is {with_article(kind)}, and {supported}; leave it out"
    if kind in _FUSED:
        return f"it is a {kind}, which normalises its input before it multiplies; leave it out"
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return f"its base is a quantised {kind}, whose sizes are unknown; leave it out"
    return None


def weight_count(parameter: Any) -> int:
    """How many weights a parameter holds, also where ZeRO-3 partitions it or bitsandbytes packs two into a byte."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    is_packed = type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", True)
    return parameter.numel() * (2 * parameter.element_size() if is_packed else 1)


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers of a model in the layout that can be trained and dequantised.

    On CPUs with AVX512-BF16 a call in eval mode rewrites them for speed: from then on they have no gradient and
    dequantise to nonsense. Layers that are already rewritten are written back, with scales rounded to bf16.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
            _unpack(module)


def _unpack(module: Any) -> None:
    state: Any = getattr(module.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes import functional as F  # pyright: ignore[reportMissingImports]

    absmax, plain = state.absmax, copy.copy(state)
    plain.original_nested = False  # else the scales would be quantised once more
    data, plain = F._convert_weight_packed_for_cpu_inverse(module.weight.data, plain)
    plain.absmax = absmax.T.reshape(-1).float().contiguous()
    module.weight.data, module.weight.quant_state, module.quant_state = data, plain, plain


def _moved(value: Any, device: Any) -> Any:
    """Every tensor in `value` on the device; dictionaries and bitsandbytes' states are copied, tensors only to move."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if type(value).__name__ == "QuantState":
        value = copy.copy(value)
        vars(value).update(_moved(vars(value), device))
    return value


def _straight_through(module: Any, x: Tensor, fetch: Callable[[], Tensor]) -> Tensor:
    y = _StraightThrough.apply(x, module, fetch)
    bias = module.bias
    return y + (bias - bias.detach()) if bias is not None and bias.requires_grad else y  # pyright: ignore


class _StraightThrough(torch.autograd.Function):
    """`module(x)`, with the gradient of `x W^T`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, fetch: Callable[[], Tensor]) -> Tensor:
        ctx.fetch = fetch
        return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ ctx.fetch().to(grad.dtype), None, None
