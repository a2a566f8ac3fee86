"""How base layers keep their weight: the mathematics knows a matrix W (out, in), layers store it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flashbone.errors import ConfigError


class BaseKind:
    """How one kind of base layer keeps its weight. This one is `torch.nn.Linear`'s: as W itself.

    It has no state: what it reads and writes is in the module that it is given. Reading, writing, keeping and restoring
    are here and nowhere else, so that whoever shards, quantises or offloads weights is met in one place.

    Attributes:
        keeps_always: Whether a merge keeps the original in any case.
    """

    parameter_name = "weight"
    keeps_always = False

    def parameter(self, module: Any) -> Any:
        """What holds W, on the layer's device: what layers with one weight share."""
        return getattr(module, self.parameter_name)

    def sizes(self, module: Any) -> tuple[int, int]:
        """(out, in) of W."""
        return module.out_features, module.in_features

    def matrix(self, stored: Tensor) -> Tensor:
        """W as a view of what is stored."""
        return stored

    def stored(self, W: Tensor, module: Any) -> Tensor:
        """W (out, in) as the layer stores it; a view."""
        return W

    def weight(self, module: Any) -> Tensor:
        """W, a view of the module's parameter: gradients reach it."""
        return self.matrix(self.parameter(module))

    def is_refetched(self, module: nn.Module) -> bool:
        """Whether W is made for each reader, so that nobody is to keep it: bat-col reads it again in backward."""
        return False

    def unreadable(self, module: nn.Module) -> str | None:
        """Why W cannot be read, so that nothing that needs it is possible; None if it can."""
        return None

    def caller(self, module: Any) -> Callable[..., Tensor]:
        """What to call for the layer's output, with all its gradients."""
        return module

    def check_writable(self, module: nn.Module) -> None:
        """
        Raises:
            ConfigError: the weight is computed, so that it cannot be set.
        """
        if self.parameter_name not in module._parameters:
            raise ConfigError(
                "the base weight is computed by a parametrisation, such as weight_norm, and cannot be merged into;"
                " remove the parametrisation first"
            )

    def write(self, module: Any, W: Tensor) -> None:
        """Make W the module's weight; the parameter stays the same object."""
        self.parameter(module).data = self.stored(W, module).contiguous()

    def keep(self, module: Any) -> Any:
        """The weight in host memory, to be restored. On the CPU this is its own storage: `write` makes a new one."""
        return self.parameter(module).data.to("cpu")

    def kept_weight(self, module: Any, kept: Any) -> Tensor:
        """W of what `keep` returned, on the module's device."""
        return self.matrix(kept.to(self.parameter(module).device))

    def restore(self, module: Any, kept: Any) -> None:
        """Give the module back what `keep` returned."""
        parameter = self.parameter(module)
        parameter.data = kept.to(parameter.device, parameter.dtype)


class TransposedKind(BaseKind):
    """transformers' Conv1D, GPT-2's linear layer, and Embedding: store the transpose, (in, out)."""

    def sizes(self, module: Any) -> tuple[int, int]:
        in_features, out_features = getattr(module.weight, "ds_shape", module.weight.shape)
        return out_features, in_features

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def stored(self, W: Tensor, module: Any) -> Tensor:
        return W.mT


LINEAR, TRANSPOSED = BaseKind(), TransposedKind()


def kind_of(module: nn.Module, get_apply_tensor_subclass: Any = None) -> BaseKind:
    """How this base layer keeps its weight; torchao needs PEFT's `get_apply_tensor_subclass` to requantise it.

    Raises:
        ConfigError: the family cannot adapt such a layer.
    """
    if (reason := unsupported_reason(module)) is not None:
        raise ConfigError(f"a Bone adapter cannot be put on this layer: {reason}")
    from flashbone.tuner.layers.quantized import quantized_kind_of

    if (quantized := quantized_kind_of(module, get_apply_tensor_subclass)) is not None:
        return quantized
    return TRANSPOSED if isinstance(module, Conv1D) else LINEAR


def unsupported_reason(base_layer: nn.Module) -> str | None:
    """Why the family cannot adapt this layer; None if it can."""
    from flashbone.tuner.layers.quantized import quantized_kind_of, quantized_problem

    kind = type(base_layer).__name__
    if quantized_kind_of(base_layer) is not None:
        return quantized_problem(base_layer)
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        supported = "only torch.nn.Linear and transformers' Conv1D are supported"
        return f"it is {article(kind)} {kind}, and {supported}; leave it out"
    return None


def article(word: str) -> str:
    """ "a" or "an"."""
    return "an" if word[:1].upper() in "AEIOU" else "a"


def is_plain(module: nn.Module, forwards: tuple | None = None) -> bool:
    """Whether calling the layer is its own product and nothing else: no other forward, no hooks, no adapter."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or type(module).forward not in (forwards or (nn.Linear.forward, Conv1D.forward))
        or "forward" in vars(module)
        or nn.modules.module._has_any_global_hook()
    )
