"""Adapted models without numbers: torch's fake tensors have shapes, dtypes and a device, and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cases import Setting
from benchmarks.methods import adapted


@contextmanager
def on_paper(module: nn.Module, setting: Setting, targets: list[str]) -> Iterator[Any]:
    """A module of the meta device with the adapters of a setting, in training mode; within the block its parameters,
    and whatever is made of them, are fake tensors on the CPU. Autocast, which the meta device lacks, works."""
    model = adapted(module, setting, targets)  # PEFT moves parameters about, which fake ones do not bear
    with FakeTensorMode():
        made: dict[int, Tensor] = {}
        for child in model.modules():
            for tensors in (child._parameters, child._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = made.setdefault(id(tensor), _fake(tensor))
        yield model.train()


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def storage(tensor: Tensor) -> int:
    """An identity of the memory behind a tensor, as long as somebody holds the tensor."""
    return tensor.untyped_storage()._cdata
