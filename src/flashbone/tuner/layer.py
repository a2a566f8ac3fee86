"""BoneLayer and BoneLinear: a linear layer with any number of adapters of the family, in PEFT's terms."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flashbone import shards, variants
from flashbone.errors import ConfigError, FlashboneError
from flashbone.ops.moves import Moves
from flashbone.variants.undo import undo


def unsupported_reason(base_layer: nn.Module) -> str | None:
    """Why the family cannot adapt this layer; None if it can."""
    kind = type(base_layer).__name__
    if resolve_quantization_backend(base_layer) is not None:
        return f"its base is a quantised {kind}, which is not supported yet; load the model without quantisation"
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        return f"it is a {kind}, and only torch.nn.Linear and transformers' Conv1D are supported; leave it out"
    return None


class BoneLayer(BaseTunerLayer):
    """The adapters of one layer: blocks, sizes, scales and dropouts by adapter name, and what merging keeps.

    `keep_original` (default True): a merge keeps the pristine weight in host memory, so that unmerging gives it back
    bit for bit. Where host memory is short, set it to False before merging; unmerging then computes the base back, with
    rounding.
    """

    in_features: int
    out_features: int
    base_layer: nn.Module

    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_r", "bone_mini_r", "bone_variant", "bone_scale", "bone_dropout")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.bone_r: dict[str, int] = {}
        self.bone_mini_r: dict[str, int] = {}
        self.bone_variant: dict[str, str] = {}
        self.bone_scale: dict[str, float] = {}
        self.bone_dropout = nn.ModuleDict()
        self.bone_block = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.keep_original = True
        self._original_weight: Tensor | None = None
        self.kwargs = kwargs

        base: Any = self.get_base_layer()
        if (reason := unsupported_reason(base)) is not None:
            raise ConfigError(f"a Bone adapter cannot be put on this layer: {reason}")
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = getattr(base.weight, "ds_shape", base.weight.shape)
        else:
            self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        init_weights: bool | str,
        inference_mode: bool = False,
        *,
        variant: str | None = None,
        dropout: float = 0.0,
        mini_r: int = 1,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to this layer.

        Args:
            adapter_name: Its name.
            r: Block size.
            init_weights: True for a start at zero, False for a random one, "bat" for zero and the variant bat-col.
            inference_mode: Whether the adapter starts frozen.
            variant: The variant; None takes PEFT's meaning of `init_weights`.
            dropout: Dropout on the input of the adapter.
            mini_r: Columns of the block of the variant mini.

        Raises:
            ConfigError: r or the variant is out of range.
        """
        if r <= 0:
            raise ConfigError(f"`r` should be a positive integer value but the value passed is {r}")
        variant = variant or ("bat-col" if init_weights == "bat" else "bone")
        shape = variants.get(variant).block_shape(self.out_features, self.in_features, r, mini_r)

        self.bone_r[adapter_name], self.bone_mini_r[adapter_name] = r, mini_r
        self.bone_variant[adapter_name], self.bone_scale[adapter_name] = variant, 1.0
        self.bone_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.bone_block[adapter_name] = nn.Parameter(torch.zeros(shape))
        if not init_weights:
            variants.random_block_(self.bone_block[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply what the adapter adds by `scale`; 1 is the trained strength. Not seen by a merge that stands."""
        if adapter in self.bone_scale:
            self.bone_scale[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale`."""
        for name in self._active():
            self.bone_scale[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters by `scale`; None resets them to 1."""
        for name in self._active():
            self.bone_scale[name] = 1.0 if scale is None else self.bone_scale[name] / scale

    def get_delta_weight(self, adapter: str, orig_weight: Tensor | None = None) -> Tensor:
        """The difference that merging the adapter makes to the base weight, in the base's layout, in every variant.

        Args:
            adapter: Its name.
            orig_weight: The weight that it is merged into; None takes the pristine base weight, also while merged.

        Returns:
            A new tensor in fp32 (fp64 for an fp64 base); in `orig_weight`'s dtype if that was given.
        """
        W = self._pristine_weight()
        if orig_weight is not None:
            W = orig_weight.detach().mT if self._transposed else orig_weight.detach()
        block = self.bone_block[adapter].detach()
        dtype = shards.opmath_dtype(W, block)
        variant, scale = variants.get(self.bone_variant[adapter]), self.bone_scale[adapter]
        delta = variant.delta(W.to(dtype), block.to(W.device, dtype)) * scale
        delta = delta if orig_weight is None else delta.to(orig_weight.dtype)
        return delta.mT if self._transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _base_weight(self) -> Tensor:
        base: Any = self.get_base_layer()
        return base.weight

    @property
    def _transposed(self) -> bool:
        """Whether the base stores its weight as (in, out)."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.bone_block]

    def _pristine_weight(self) -> Tensor:
        """The base's weight (out, in) without any adapter, detached, on the base's device."""
        weight = self._base_weight().data
        if self._original_weight is not None:
            weight = self._original_weight.to(weight.device)
        elif self.merged:
            weight = self._unmerged_by_subtraction()
        return weight.mT if self._transposed else weight

    def _adapters(self, names: list[str]) -> list[tuple[variants.Variant, Tensor, float]]:
        # Sorted by name: the sum is then the same to the last bit, in whatever order the adapters were given.
        return [
            (variants.get(self.bone_variant[n]), self.bone_block[n].detach(), self.bone_scale[n]) for n in sorted(names)
        ]

    def _unmerged_by_subtraction(self) -> Tensor:
        weight = self._base_weight().data
        restored = undo(weight.mT if self._transposed else weight, self._adapters(self.merged_adapters))
        return restored.mT.contiguous() if self._transposed else restored


class BoneLinear(nn.Module, BoneLayer):
    """A `torch.nn.Linear` or transformers `Conv1D` with adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, r: int = 0, init_weights: bool | str = True, **kwargs: Any
    ) -> None:
        super().__init__()
        BoneLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, init_weights, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output with the moves of all active adapters; x (..., in) -> (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._active()
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        moves = Moves(x)
        for name in active:
            dropout = self.bone_dropout[name]
            seen = dropout(x) if self.training and isinstance(dropout, nn.Dropout) else x
            variants.get(self.bone_variant[name]).move(moves, seen, self.bone_block[name], self.bone_scale[name])
        return moves.run(lambda base_x: self.base_layer(base_x, *args, **kwargs), self._weight_and_bias)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        return (base.weight.mT if self._transposed else base.weight), base.bias

    def merged_weight(self, adapter_names: list[str], must_be_finite: bool = False) -> Tensor:
        """The base weight, in its own layout and dtype, with exactly the named adapters in it; nothing is changed.

        Raises:
            NonFiniteError: `must_be_finite`, and it would hold NaN or infinity.
        """
        names = [n for n in adapter_names if n in self.bone_block]
        where = f"adapter {', '.join(map(repr, names))}"
        merged = variants.merged_weight(self._pristine_weight(), self._adapters(names), where, must_be_finite)
        return merged.mT.contiguous() if self._transposed else merged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight.

        Every delta refers to the pristine weight, so that the order of merges never matters.

        Args:
            safe_merge: Raise, and change nothing, if the result would hold NaN or infinity.
            adapter_names: The adapters to merge; None takes the active ones.

        Raises:
            NonFiniteError: see `safe_merge`.
            FlashboneError: `keep_original` is off, and two adapters to merge depend on the weight (bat-*).
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.bone_block]
        if not names:
            return
        everything = [*self.merged_adapters, *names]
        if not self.keep_original:
            self._check_can_be_undone(everything)
        merged = self.merged_weight(everything, must_be_finite=safe_merge)
        base: Any = self.get_base_layer()
        if self.keep_original and self._original_weight is None:
            # On the CPU this is the weight's own storage: no copy is made, the merged weight is the new one.
            self._original_weight = base.weight.data.to("cpu")
        base.weight.data = merged
        self.merged_adapters.extend(names)

    def _check_can_be_undone(self, names: list[str]) -> None:
        dependent = [n for n in names if variants.get(self.bone_variant[n]).delta_depends_on_weight]
        if len(dependent) > 1:
            raise FlashboneError(
                f"adapters {', '.join(map(repr, dependent))} all depend on the base weight and could not be unmerged"
                " again without it; leave keep_original on, or merge one of them"
            )

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again: bit for bit where the original was kept."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self._base_weight()
        if self._original_weight is not None:
            weight.data = self._original_weight.to(weight.device, weight.dtype)
        else:
            weight.data = self._unmerged_by_subtraction()
        self._original_weight = None
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare base layer, with the adapters merged into it if asked for; no original is kept."""
        base: Any = self.get_base_layer()
        if merge:
            names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.bone_block]
            if names:
                base.weight.data = self.merged_weight([*self.merged_adapters, *names], must_be_finite=safe_merge)
        return base

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {self.bone_variant[n]} r={r}" for n, r in self.bone_r.items())

    def __repr__(self) -> str:
        return "bone." + super().__repr__()
