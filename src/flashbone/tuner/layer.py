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
from flashbone.errors import ConfigError
from flashbone.ops.moves import Moves
from flashbone.variants.undo import check_undoable, undo


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
        # What stands merged, as it was merged: blocks and scales may change while a merge stands.
        self._merged_as: dict[str, tuple[str, Tensor, float]] = {}
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

    def _as_now(self, names: list[str]) -> dict[str, tuple[str, Tensor, float]]:
        return {n: (self.bone_variant[n], self.bone_block[n].detach(), self.bone_scale[n]) for n in names}

    def _unmerged_by_subtraction(self) -> Tensor:
        weight = self._base_weight().data
        restored = undo(weight.mT if self._transposed else weight, _terms(self._merged_as))
        return restored.mT.contiguous() if self._transposed else restored


def _terms(adapters: dict[str, tuple[str, Tensor, float]]) -> list[tuple[variants.Variant, Tensor, float]]:
    # Sorted by name: the sum is then the same to the last bit, in whatever order the adapters were given.
    return [(variants.get(kind), block, scale) for _, (kind, block, scale) in sorted(adapters.items())]


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
        return moves.run(
            lambda base_x: self.base_layer(base_x, *args, **kwargs), self._weight_and_bias, self._is_plain_base
        )

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        return (base.weight.mT if self._transposed else base.weight), base.bias

    def _is_plain_base(self) -> bool:
        """Whether calling the base is its matrix product and nothing else: no other forward, no hooks, no adapter."""
        base = self.base_layer
        hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return type(base).forward in (nn.Linear.forward, Conv1D.forward) and not hooks and "forward" not in vars(base)

    def merged_weight(self, adapter_names: list[str], must_be_finite: bool = False) -> Tensor:
        """The base weight, in its own layout and dtype, with exactly the named adapters in it; nothing is changed.

        Adapters that stand merged are taken as they were merged, the others as they are now.

        Raises:
            NonFiniteError: `must_be_finite`, and it would hold NaN or infinity.
            ConfigError: the weight is computed by a parametrisation, so that it cannot be set.
        """
        self._check_weight_can_be_set()
        names = [n for n in dict.fromkeys(adapter_names) if n in self.bone_block]
        terms = _terms(self._as_now(names) | {n: self._merged_as[n] for n in names if n in self._merged_as})
        where = f"adapter {', '.join(map(repr, names))}"
        merged = variants.merged_weight(self._pristine_weight(), terms, where, must_be_finite)
        return merged.mT.contiguous() if self._transposed else merged

    def _check_weight_can_be_set(self) -> None:
        if "weight" not in self.get_base_layer()._parameters:
            raise ConfigError(
                "the base weight is computed by a parametrisation, such as weight_norm, and cannot be merged into;"
                " remove the parametrisation first"
            )

    def check_merge(self, adapter_names: list[str], must_be_finite: bool, undoable: bool) -> None:
        """Find out, without changing anything, whether these adapters can be merged: to finite values, and so that
        the pristine weight could be computed back.

        Raises:
            FlashboneError: as `merge` does.
        """
        names = self._to_merge(adapter_names)
        if names and (must_be_finite or undoable):
            self._prepare_merge(names, must_be_finite, undoable)
        elif names:
            self._check_weight_can_be_set()

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in dict.fromkeys(names) if n in self.bone_block and n not in self._merged_as]

    def _prepare_merge(self, names: list[str], must_be_finite: bool, undoable: bool) -> Tensor:
        """The merged weight, checked as asked for."""
        merged = self.merged_weight([*self.merged_adapters, *names], must_be_finite)
        if undoable:
            check_undoable(
                self._pristine_weight(),
                merged.mT if self._transposed else merged,
                _terms(self._as_now(names) | self._merged_as),
            )
        return merged

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight.

        Every delta refers to the pristine weight, so that the order of merges never matters.

        Args:
            safe_merge: Raise, and change nothing, if the result would hold NaN or infinity.
            adapter_names: The adapters to merge; None takes the active ones.

        Raises:
            NonFiniteError: see `safe_merge`.
            ConfigError: the base weight cannot be set.
            FlashboneError: `keep_original` is off, and the pristine weight could not be computed back.
        """
        check_adapters_to_merge(self, adapter_names)  # PEFT's warnings
        names = self._to_merge(adapter_names)
        if not names:
            return
        merged = self._prepare_merge(names, must_be_finite=safe_merge, undoable=not self.keep_original)
        weight = self._base_weight()
        if self.keep_original and self._original_weight is None:
            # On the CPU this is the weight's own storage: no copy is made, the merged weight is the new one.
            self._original_weight = self._pristine_storage()
        weight.data = merged
        self._merged_as |= {n: (v, block.clone(), scale) for n, (v, block, scale) in self._as_now(names).items()}
        self.merged_adapters.extend(names)

    def _pristine_storage(self) -> Tensor:
        """What to keep: the weight itself, or, where a merge stands that kept none, the weight computed back."""
        weight = self._unmerged_by_subtraction() if self.merged else self._base_weight().data
        return weight.to("cpu")

    @torch.inference_mode(False)
    @torch.no_grad()
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
        self._merged_as = {}
        self.merged_adapters = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare base layer, with the adapters merged into it if asked for; no original is kept."""
        if merge:
            check_adapters_to_merge(self, adapter_names)  # PEFT's warnings
            if names := self._to_merge(adapter_names):
                weight = self._base_weight()
                weight.data = self.merged_weight([*self.merged_adapters, *names], must_be_finite=safe_merge)
        return self.get_base_layer()

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {self.bone_variant[n]} r={r}" for n, r in self.bone_r.items())

    def __repr__(self) -> str:
        return "bone." + super().__repr__()
