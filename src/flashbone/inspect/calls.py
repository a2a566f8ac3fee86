"""Which layers see the very same input, and how often each is called: found by running a skeleton, without weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8


@dataclass(frozen=True)
class Call:
    """One call of a layer; calls with equal `input` see the same tensor."""

    layer: str
    input: int


@dataclass(frozen=True)
class Calls:
    """The calls of one forward pass, in their order.

    Attributes:
        calls: each of them.
        assumption: a sentence on what was not seen and how it is counted; empty where every layer was called.
    """

    calls: tuple[Call, ...]
    assumption: str = ""


def trace_calls(model: nn.Module, layers: dict[str, nn.Module]) -> Calls:
    """Run a model on the meta device with a few tokens, and note the calls of the layers.

    Layers that are not reached count as called once, with an input that no other layer sees.
    """
    seen, reason = _seen_calls(model, layers)
    identities: dict[int, int] = {}
    calls = [Call(name, identities.setdefault(_storage(x), len(identities))) for name, x in seen]
    reached = {call.layer for call in calls}
    missed = [name for name in layers if name not in reached]
    calls += [Call(name, len(identities) + i) for i, name in enumerate(missed)]
    if not missed:
        return Calls(tuple(calls))
    how = "as called once, with an input that no other layer sees"
    if reason:
        return Calls(tuple(calls), f"Every layer counts {how}: {reason}.")
    return Calls(
        tuple(calls), f"Linear layers that a run on text does not call, {len(missed)} of {len(layers)}, count {how}."
    )


def _seen_calls(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[list[tuple[str, Tensor]], str]:
    """The calls with their inputs (held, so that no other tensor gets their identity), or why there are none."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return [], "its input is not text"
    error = None
    for inputs in _attempts(model):
        seen: list[tuple[str, Tensor]] = []
        with _recording(layers, seen):
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception as caught:  # whatever code of a model does without numbers
                error = caught
                continue
        return seen, ""
    return [], f"it cannot be run without weights ({type(error).__name__})"


@contextmanager
def _recording(layers: dict[str, nn.Module], seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    def note(name: str) -> Any:
        return lambda module, args, kwargs: seen.append((name, [*args, *kwargs.values()][0]))  # x comes first

    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attempts(model: Any) -> Iterator[dict[str, Tensor]]:
    """Token ids with one mask after the other. Most models look into a mask of two axes, which a tensor without numbers
    cannot be, and take one of four axes as it is; some know nothing of that."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    wide = torch.zeros(1, 1, TOKENS, TOKENS, dtype=model.dtype, device="meta")
    accepted = inspect.signature(model.forward).parameters
    for mask in (wide, None, torch.ones_like(ids)):
        offered = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            offered |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        yield {name: value for name, value in offered.items() if name in accepted and value is not None}


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
