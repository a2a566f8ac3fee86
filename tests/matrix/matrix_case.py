"""One cell of the matrix: a model with one layer of a kind, adapters with known blocks, and what the formula says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matrix_hosts import Host
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from flashbone import BoneConfig, BoneLayer
from helpers import reference
from helpers.comparison import TOLERANCES, Promise, relative_error, same_bits

R, SECOND_R = 4, 3
SECOND = {"bone": "bat-row", "mini": "bone", "bat-row": "bat-col", "bat-col": "orthogonal", "orthogonal": "mini"}


class Net(nn.Module):
    """One layer, called by its name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        if (requantised_with := getattr(layer, "requantised_with", None)) is not None:  # as transformers' models say it
            settings = SimpleNamespace(get_apply_tensor_subclass=requantised_with)
            self.hf_quantizer = SimpleNamespace(quantization_config=settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)


@dataclass
class Case:
    """A kind of layer, a variant and a dtype. The adapters `first` and `twin` are of the variant, `second` is not."""

    host: Host
    variant: str
    dtype: torch.dtype
    folder: Path
    _bare: nn.Module = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._bare = self._build()
        self.x = self.host.inputs(self.dtype)
        self._values: dict[str, Tensor] = {}

    def model(self) -> Net:
        """The model without adapters; every time the same."""
        return Net(self._build()).eval()

    def _build(self) -> nn.Module:
        with torch.random.fork_rng():  # not a copy: not every quantised layer can be copied
            torch.manual_seed(7)
            return self.host.build(self.dtype).requires_grad_(False).eval()

    def attach(self, model: nn.Module, name: str = "first", **fields: Any) -> PeftModel:
        """Add an adapter to a bare or an adapted model."""
        kind = self._variant(name)
        fields = {"variant": kind, "r": SECOND_R if name == "second" else R, "mini_r": 2, **self.host.target} | fields
        config = BoneConfig(**fields)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            return model
        return get_peft_model(model, config, adapter_name=name)

    def adapted(self, second: bool = False, twin: bool = False, init_weights: bool = False, **fields: Any) -> PeftModel:
        """The model with `first`, and the others if asked for; blocks are always the same, zero if `init_weights`."""
        model = self.model()
        for name in ["first", *["second"] * second, *["twin"] * twin]:
            model = self.attach(model, name, init_weights=init_weights, **fields)
            for block in self.blocks(model, name):
                self._values.setdefault(name, torch.randn(block.shape) / 4)
                if not init_weights:
                    block.data = self._values[name].to(block)
        model.set_adapter("first")
        return model

    def _variant(self, name: str) -> str:
        wanted = SECOND[self.variant] if name == "second" else self.variant
        return wanted if self.host.refusal("*", wanted) is None else self.variant

    def value(self, name: str) -> Tensor:
        """The block of an adapter."""
        if name not in self._values:
            self.adapted(second=name == "second", twin=name == "twin")
        return self._values[name]

    def layer(self, model: nn.Module) -> Any:
        """The adapted layer of a model."""
        return next(module for module in model.modules() if isinstance(module, BoneLayer))

    def blocks(self, model: nn.Module, name: str) -> list[nn.Parameter]:
        """The adapter's block, if the model has it."""
        return [p for key, p in model.named_parameters() if key.endswith(f"bone_block.{name}")]

    def base_output(self) -> Tensor:
        """What the model without adapters gives."""
        with torch.no_grad():
            return self.model()(self.x)

    def delta(self, name: str) -> Tensor:
        """The adapter's delta by the formula, in fp64."""
        return self._delta_of(self._variant(name), self.value(name).to(self.stored_dtype(name)).double())

    def _delta_of(self, variant: str, block: Tensor) -> Tensor:
        W = self.host.matrix(self._bare)
        if W.ndim == 2:
            return reference.delta(variant, W, block)
        return torch.stack([reference.delta(variant, W_e, block_e) for W_e, block_e in zip(W, block, strict=True)])

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that the block is kept in."""
        return self.blocks(self.adapted(second=name == "second", twin=name == "twin"), name)[0].dtype

    def formula(self, *terms: str | tuple[str, float]) -> Tensor:
        """The output with these adapters (each with its scale, or 1) by the formula, in fp64."""
        W = self.host.matrix(self._bare)
        for term in terms:
            name, scale = term if isinstance(term, tuple) else (term, 1.0)
            W = W + scale * self.delta(name)
        return self.host.output(self._bare, W, self.x).detach()

    def differentiable_input(self) -> Tensor | None:
        """The input with a gradient; None for indices."""
        return self.x.clone().requires_grad_() if self.x.is_floating_point() else None

    def formula_gradients(self, name: str, factors: Tensor, with_input: bool) -> list[Tensor]:
        """Gradients of `sum(factors * output)` with regard to block and input, in fp64."""
        block = self.value(name).to(self.stored_dtype(name)).double().requires_grad_()
        x = self.x.double().requires_grad_() if with_input else self.x
        W = self.host.matrix(self._bare)
        W = W + self._delta_of(self.variant, block)
        loss = (self.host.output(self._bare, W, x) * factors.double()).sum()
        return list(torch.autograd.grad(loss, [block, x] if with_input else [block]))

    def as_matrix(self, stored: Tensor) -> Tensor:
        """A delta in the layer's own layout, as (out, in)."""
        return self.layer(self.adapted()).base_kind.matrix(stored)

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The input in another dtype."""
        return self.x.to(dtype) if self.x.is_floating_point() else self.x

    def noise(self) -> float:
        """How far the bare layer itself is from its formula: the noise of quantised kernels."""
        return relative_error(self.base_output(), self.host.output(self._bare, self.host.matrix(self._bare), self.x))

    def assert_close(self, got: Tensor, want: Tensor, dtype: torch.dtype | None = None, merged: bool = False) -> None:
        """Equal to the rounding of the case's dtype, and to a small multiple of the bare layer's own noise.

        With `merged`, also to the noise of quantising the merged weight anew.
        """
        dtypes = [self.dtype, dtype or self.dtype]
        tolerance = max(*(TOLERANCES[d] for d in dtypes), 4 * self.noise(), self.host.requantised if merged else 0.0)
        error = relative_error(got, want)
        assert error <= tolerance, f"relative error {error:.3g}, tolerance {tolerance:.3g}"

    def state_of_base(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of everything but blocks."""
        return {name: t.clone() for name, t in model.state_dict().items() if "bone_" not in name and torch.is_tensor(t)}

    def assert_base_is(self, model: nn.Module, before: dict[str, Tensor]) -> None:
        """Everything but blocks is as it was, bit for bit."""
        after = self.state_of_base(model)
        assert before.keys() == after.keys()
        assert all(same_bits(_plain(before[name]), _plain(after[name]), Promise.UNTOUCHED) for name in before)


def _plain(t: Tensor) -> Tensor:
    """A tensor that can be compared; torchao's cannot."""
    return t.dequantize() if hasattr(t, "tensor_data_names") else t
