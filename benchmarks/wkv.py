"""RWKV's time mixing alone, in chunks and token by token; imported by workers only."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Setting
from benchmarks.timing import timed_ms


class WkvForwardSubject:
    """Outputs and the last state of random sequences, whose state and decays are fp32 as in the models."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        shape = tuple(case.shape[key] for key in ("batch", "tokens", "heads", "size"))
        batch, _, heads, size = shape
        r, k, v = (torch.randn(shape) for _ in range(3))
        if case.shape["version"] == 7:
            direction = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
            log_w = -0.6065 * torch.randn(shape).sigmoid()
            given = [r, log_w, k, v, -direction, direction * torch.randn(shape).sigmoid()]
        else:
            given = [r, -torch.randn(shape).exp(), k, v, torch.randn(heads, size)]
        dtype = getattr(torch, case.dtype)
        given = [x if place == 1 else x.to(dtype) for place, x in enumerate(given)]
        self.given = [x.to(case.device) for x in (*given, torch.randn(batch, heads, size, size))]

    def op(self, setting: Setting) -> Callable[..., tuple[Tensor, Tensor]]:
        """What a setting calls."""
        module = importlib.import_module(f"flashbone.rwkv.wkv{self.case.shape['version']}")  # not with an old PEFT
        return getattr(module, setting.method.removeprefix("wkv-"))

    def prepare(self, setting: Setting) -> Callable[[], dict[str, float]]:
        """The time of forward in inference mode."""
        op = self.op(setting)

        def repetition() -> dict[str, float]:
            with torch.inference_mode():
                return {"time_ms": timed_ms(lambda: op(*self.given), self.case.device, self.case.calls)}

        return repetition


class WkvTrainingSubject(WkvForwardSubject):
    """The same with the gradients of all that goes in."""

    def prepare(self, setting: Setting) -> Callable[[], dict[str, float]]:
        """The time of forward and backward, and what lies in memory between the two."""
        op, leaves = self.op(setting), [x.clone().requires_grad_() for x in self.given]
        saved_mib = _saved_mib(lambda: op(*leaves))
        gradients = [torch.randn_like(x) for x in op(*leaves)]

        def forward_backward() -> None:
            torch.autograd.grad(op(*leaves), leaves, gradients)

        def repetition() -> dict[str, float]:
            return {
                "time_ms": timed_ms(forward_backward, self.case.device, self.case.calls),
                "saved_mib": saved_mib,
            }

        return repetition


def _saved_mib(call: Callable[[], object]) -> float:
    """What autograd keeps of a call for its backward, inputs among it; shared memory once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = call()  # held until here, so that no address is used twice
    del outputs
    return sum(kept.values()) / 2**20
