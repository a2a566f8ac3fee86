"""One architecture: adapters on every linear layer and convolution, live against merged, with a gradient for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import BoneConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from architectures.tiny import inputs_of, tiny_model
from flashbone.errors import FlashboneError
from flashbone.tuner.layers.conv import CONVOLUTIONS
from flashbone.tuner.layers.layer import bone_layers
from helpers.comparison import relative_error

WORKS, REFUSED, BROKEN, NOT_BUILT, NOT_RUN = "works", "refused", "broken", "not built", "not run"
CLOSE = 2e-4  # of fp32 through whole models; an adapter that does nothing changes more than a hundred times that
TOO_SLOW = {"yolos"}


@dataclass
class Row:
    model_type: str
    outcome: str
    layers: int = 0
    read: int = 0
    unused: int = 0
    detail: str = ""


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return _tensors(dict(model(**inputs)))


def loss_of(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    parts = [(t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).mean() for t in outputs]
    return sum(parts, torch.zeros((), dtype=torch.float64))


def targets_of(model: Any) -> list[str]:
    """Linear layers and convolutions whose weight is a parameter of their own, without the output embeddings."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))
        and module is not output
        and owners.get(id(module._parameters.get("weight")), 2) == 1
        and "_ConvTranspose" not in type(module).__mro__[1].__name__
    ]


def sweep(model_type: str) -> Row:
    torch.manual_seed(0)
    try:
        if model_type in TOO_SLOW:
            raise ValueError("its images cannot be made small enough")
        base = tiny_model(model_type)
    except Exception as error:  # whatever a host's constructor raises
        return Row(model_type, NOT_BUILT, detail=_line(error))
    try:
        inputs = inputs_of(base)
        outputs = run(base, inputs)
        loss = loss_of(outputs)
        loss.backward()
        assert loss.isfinite()
    except Exception as error:  # as above, of its forward
        return Row(model_type, NOT_RUN, detail=_line(error))
    names = targets_of(base)
    used = {name: base.get_submodule(name).weight.grad for name in names}
    used = {name for name, grad in used.items() if grad is not None and grad.abs().max() > 1e-12}
    base.zero_grad()
    try:
        model = get_peft_model(base, BoneConfig(r=4, target_modules=names))
    except FlashboneError as error:
        return Row(model_type, REFUSED, len(names), detail=_line(error))
    layers = dict(bone_layers(model.base_model.model))
    row = Row(
        model_type,
        WORKS,
        len(layers),
        sum(x.weight_reader is not None for x in layers.values()),
        len(names) - len(used),
    )
    return _checked(row, model, layers, used, inputs, outputs)


def _checked(row: Row, model: Any, layers: dict, used: set[str], inputs: Any, outputs: list[Tensor]) -> Row:
    start = run(model, inputs)
    problems = [] if _error(start, outputs) < CLOSE else ["a start at zero changes the output"]
    loss_of(start).backward()
    grads = {name: layer.bone_block["default"].grad for name, layer in layers.items()}
    inert = sorted(name for name in used if grads[name] is None or not grads[name].any())
    with torch.no_grad():
        for layer in layers.values():
            W = layer.get_base_layer().weight
            layer.bone_block["default"].copy_(torch.randn_like(layer.bone_block["default"]) * 0.05 * W.std())
    live = run(model, inputs)
    model.merge_adapter()
    merged = run(model, inputs)
    if used and _error(live, outputs) < 1e-4:
        problems.append("the adapters change nothing")
    if not (error := _error(live, merged)) < CLOSE:
        problems.append(f"live and merged differ by {error:.1e}")
    problems += [f"no gradient: {', '.join(inert[:4])} ({len(inert)})"] if inert else []
    return Row(row.model_type, BROKEN, row.layers, row.read, row.unused, "; ".join(problems)) if problems else row


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    return max((relative_error(g, w) for g, w in zip(got, want, strict=True)), default=0.0)


def _line(error: Exception) -> str:
    words = re.sub(r" from '[^']*'", "", str(error)).split()  # a path of the machine
    return f"{type(error).__name__}: {' '.join(words)[:160]}"
