"""How base layers store their weight: the mathematics knows a matrix W (out, in), layers may store it differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flashbone.errors import ConfigError


class BaseKind:
    """How one kind of base layer stores its weight; this class is for `torch.nn.Linear`, which stores W itself.

    A kind has no state. It reads, writes, saves and restores the weight of the module that is passed to each method,
    and no other code does, so weights that hosts quantise are handled in one place.

    Attributes:
        always_keeps_original: Whether a merge saves the original weight even with `keep_original=False`.
    """

    parameter_name = "weight"
    always_keeps_original = False

    def parameter(self, module: Any) -> Any:
        """The parameter that holds W. Layers with tied weights share it."""
        return parameter_of(module, self.parameter_name)

    def sizes(self, module: Any) -> tuple[int, int]:
        """(out, in) of W."""
        return module.out_features, module.in_features

    def matrix(self, stored: Tensor) -> Tensor:
        """W as a view of the stored tensor."""
        return stored

    def stored(self, W: Tensor, module: Any) -> Tensor:
        """W (out, in) in the layout in which the layer stores it; a view."""
        return W

    def weight(self, module: Any) -> Tensor:
        """W, a view of the module's parameter: gradients reach it."""
        return self.matrix(self.parameter(module))

    def is_refetched(self, module: nn.Module) -> bool:
        """Whether W is computed at each read, so nothing should keep it: bat-col reads it again in backward."""
        return False

    def unreadable(self, module: nn.Module) -> str | None:
        """Why W cannot be read; None if it can."""
        return None

    def caller(self, module: Any) -> Callable[..., Tensor]:
        """The function that computes the layer's output with the gradient of its input."""
        return module

    def product(self, module: Any) -> Callable[[Tensor], Tensor]:
        """The same of a plain layer (`is_plain`) for rows of its input, where that is possible without the module's
        call, which costs as much as a small product."""
        parameters = module._parameters
        W = parameters.get("weight")
        if type(W) is not nn.Parameter or "bias" not in parameters or type(module).forward is not nn.Linear.forward:
            return self.caller(module)
        bias = parameters["bias"]
        return lambda x: linear(x, W, bias)

    def check_writable(self, module: nn.Module) -> None:
        """
        Raises:
            ConfigError: a parametrisation computes the weight.
        """
        if self.parameter_name not in module._parameters:
            raise ConfigError(
                "the base weight is computed by a parametrisation, such as weight_norm, and cannot be merged into;"
                " remove the parametrisation first"
            )

    def write(self, module: Any, W: Tensor) -> None:
        """Set the module's weight to W; the parameter stays the same object."""
        self.parameter(module).data = self.stored(W, module).contiguous()

    def hold(self, module: Any) -> Any:
        """The weight's own storage, for `restore`: `write` allocates a new one."""
        return self.parameter(module).data

    def keep(self, module: Any) -> Any:
        """The weight in host memory, for `restore`; on the CPU its own storage."""
        return self.hold(module).to("cpu")

    def kept_weight(self, module: Any, kept: Any) -> Tensor:
        """W from the result of `keep`, on the module's device."""
        return self.matrix(kept.to(self.parameter(module).device))

    def restore(self, module: Any, kept: Any) -> None:
        """Put the weight that `keep` returned back into the module."""
        parameter = self.parameter(module)
        parameter.data = kept.to(parameter.device, parameter.dtype)


class TransposedKind(BaseKind):
    """Conv1D of transformers (GPT-2's linear layer) and Embedding, which store the transpose, (in, out)."""

    def sizes(self, module: Any) -> tuple[int, int]:
        in_features, out_features = getattr(module.weight, "ds_shape", module.weight.shape)
        return out_features, in_features

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def stored(self, W: Tensor, module: Any) -> Tensor:
        return W.mT


LINEAR, TRANSPOSED = BaseKind(), TransposedKind()


def parameter_of(module: Any, name: str) -> Any:
    """The module's attribute, without the chain of Python calls in which torch looks parameters up."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def with_article(class_name: str) -> str:
    """The name of a class after "a" or "an"."""
    return f"{'an' if class_name[:1].upper() in 'AEIOU' else 'a'} {class_name}"


def is_plain(module: nn.Module, forwards: tuple | None = None) -> bool:
    """Whether calling the layer is its matrix product and nothing else: no other forward, no hooks, no adapter."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or type(module).forward not in (forwards or (nn.Linear.forward, Conv1D.forward))
        or "forward" in vars(module)
        or nn.modules.module._has_any_global_hook()
    )
