"""What an adapted layer keeps and computes, and which layers see the same input: counted in calls on tensors without
numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

LayerCall = tuple[str, int]  # the layer's name, and a number of its input: equal where the input is the same tensor
TOKENS_OF_TRACE = 8


@dataclass(frozen=True)
class LayerCost:
    """What one adapted layer trains, and what the adapter adds to a call of it.

    Attributes:
        tensors: ending of the key in the adapter file -> trained tensor.
        kept_bytes: kept for backward, for this layer alone.
        kept_input_bytes: of the layer's input as it came, which layers that see the same input keep together.
        multiply_adds: for each token.
    """

    tensors: dict[str, Tensor]
    kept_bytes: int
    kept_input_bytes: int
    multiply_adds: float

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def measure(layer: Any, trained: dict[str, Tensor], tokens: int, dtype: torch.dtype) -> LayerCost:
    """What the adapter of a PEFT layer costs in a training step, under autocast where `dtype` is half precision.

    The layer's parameters may be on the meta device. torch's fake tensors take their place: without numbers, too, but
    with a device, which autocast needs. Products are counted in eval mode, in which the layer calls plain operations of
    torch instead of our operators.

    Args:
        layer: With one adapter; its dropouts are replaced.
        trained: Ending of the key in the adapter file -> tensor that the layer trains.
        tokens: Rows of the input.
        dtype: Of the input.
    """
    _fuse_dropout(layer)
    with FakeTensorMode():
        x = torch.empty(tokens, layer.in_features, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype) if dtype.itemsize < 4 else nullcontext():
            kept = _kept_storages(layer.train(), x)
            products = _multiply_adds(layer.eval(), x) - _multiply_adds(layer.get_base_layer(), x)
        kept_input = kept.pop(x.untyped_storage()._cdata, 0)
    return LayerCost(trained, sum(kept.values()), kept_input, products / tokens)


class _FusedDropout(nn.Dropout):
    """Dropout as GPUs compute it, whose mask has one byte a number; CPUs keep one in the dtype of the input."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]


def _fuse_dropout(layer: nn.Module) -> None:
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                module.add_module(name, _FusedDropout(child.p))


def _without_numbers(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }


def _kept_storages(layer: nn.Module, x: Tensor) -> dict[int, int]:
    """Identity -> bytes of each storage that a call keeps for backward, without the parameters'."""
    parameters, kept = _without_numbers(layer), {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its identity
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = functional_call(layer, parameters, (x,))
    assert output.requires_grad
    weights = {p.untyped_storage()._cdata for p in parameters.values()}
    return {key: tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights}


def _multiply_adds(module: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), _MultiplyAddCounter() as counter:
        functional_call(module, _without_numbers(module), (x,))
    return counter.multiply_adds


class _MultiplyAddCounter(TorchDispatchMode):
    """Counts multiply-adds by torch's formulas for products. FlopCounterMode would do, but it hooks every module, and
    bat-col calls a base with hooks in another way.

    torch has no formula for two operations: sums, where each addition counts as one, and solving, an LU decomposition
    and one substitution for each right-hand side.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation in flop_registry:
            self.multiply_adds += flop_registry[operation](*args, **(kwargs or {}), out_val=result) / 2
        elif operation is torch.ops.aten.sum:
            self.multiply_adds += args[0].numel()
        elif operation is torch.ops.aten._linalg_solve_ex:
            A, B = args[:2]
            self.multiply_adds += len(A) ** 3 / 3 + len(A) * B.numel()
        return result


def trace_calls(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[list[LayerCall], str]:
    """The calls of the layers in one forward pass of a model on the meta device; and a sentence on how layers are
    counted that it did not reach, empty if it reached all: as called once, with an input that no other layer sees."""
    calls, problem = _traced(model, layers)
    reached = {name for name, _ in calls}
    missed = [name for name in layers if name not in reached]
    calls += [(name, len(calls) + n) for n, name in enumerate(missed)]
    if not missed:
        return calls, ""
    how = "as called once, with an input that no other layer sees"
    if problem:
        return calls, f"Every layer counts {how}: {problem}."
    return calls, f"Linear layers that a run on text does not call, {len(missed)} of {len(layers)}, count {how}."


def _traced(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[list[LayerCall], str]:
    """The calls, or why the model cannot be run."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return [], "its input is not text"
    seen: list[tuple[str, Tensor]] = []  # with the inputs, so that no other tensor gets their identity

    def note(name: str) -> Any:
        return lambda module, args, kwargs: seen.append((name, [*args, *kwargs.values()][0]))  # x comes first

    problem = None
    with torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(note(name), with_kwargs=True))
        for inputs in _possible_inputs(model):
            seen.clear()
            try:
                model(**inputs)
            except Exception as error:  # code of models may read numbers
                problem = error
                continue
            numbers: dict[int, int] = {}
            return [(name, numbers.setdefault(x.untyped_storage()._cdata, len(numbers))) for name, x in seen], ""
    return [], f"it cannot be run without weights ({type(problem).__name__})"


def _possible_inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Token ids with one mask after another: most models read numbers from a mask of two axes, and take one of four
    axes as it is; some take no mask of four axes."""
    ids = torch.zeros(1, TOKENS_OF_TRACE, dtype=torch.long, device="meta")
    wide = torch.zeros(1, 1, TOKENS_OF_TRACE, TOKENS_OF_TRACE, dtype=model.dtype, device="meta")
    accepted = inspect.signature(model.forward).parameters
    for mask in (wide, None, torch.ones_like(ids)):
        offered = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            offered |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        yield {name: value for name, value in offered.items() if name in accepted and value is not None}
