"""BoneLayer and BoneLinear: a linear layer with any number of adapters of the family, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.ops.cache import NOTHING, Kept
from flashbone.ops.moves import Moves
from flashbone.ops.rows import Part, run_by_rows
from flashbone.tuner.layers import calls, offloading
from flashbone.tuner.layers.calls import CURRENT
from flashbone.tuner.layers.kinds import BaseKind, is_plain, parameter_of
from flashbone.tuner.layers.merged_base import check_loadable
from flashbone.tuner.layers.merging import MergeableLayer
from flashbone.tuner.layers.mixed_batch import RowNames
from flashbone.tuner.layers.plan import keep_plan
from flashbone.tuner.layers.quantized import linear_kind
from flashbone.tuner.layers.read_weights import BaseAttributes, ReadWeight
from flashbone.variants.merged import Term
from flashbone.variants.orthogonal import DEFAULT_EPS


class BoneLayer(ReadWeight, MergeableLayer):
    """The adapters of one layer: blocks, sizes, scales and dropouts by adapter name; merging is in `merging.py`.

    Attributes:
        caches: Whether eval mode without grad keeps what it builds until the model's call ends: sums of several
            adapters' blocks and, for steps with few tokens, bat-col's shifted weight, as large as the base's.
    """

    in_features: int
    out_features: int
    base_layer: nn.Module

    caches = True
    backend = "torch"
    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` reads it
    converts_to_lora = True  # whether LoRA has a linear layer for this kind
    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_r", "bone_variant", "bone_scale", "bone_dropout")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.bone_r: dict[str, int] = {}
        self.bone_variant: dict[str, variants.Variant] = {}
        self.bone_scale: dict[str, float] = {}
        self.bone_dropout = nn.ModuleDict()
        self.bone_block = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._merged_as: dict[str, Term] = {}
        self.kwargs = kwargs
        self.turn = calls.Turn()

        base = self.get_base_layer()
        self.base_kind = self._kind_of(base)
        self.out_features, self.in_features = self.base_kind.sizes(base)

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
        use_orthogonal: bool = True,
        orthogonal_eps: float = DEFAULT_EPS,
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
            use_orthogonal: Whether the block of the variant orthogonal is kept a rotation.
            orthogonal_eps: The ridge of the orthogonal map.

        Raises:
            ConfigError: r or the variant is out of range.
            ShapeError: the variant does not exist at this layer's sizes.
        """
        if r <= 0:
            raise ConfigError(f"`r` should be a positive integer value but the value passed is {r}")
        by_init = variants.by_tool_name("peft_init_weights")
        variant = variant or by_init.get(init_weights, by_init[True]).name  # as in PEFT, only "bat" is bat-col
        settings = {"use_orthogonal": use_orthogonal, "orthogonal_eps": orthogonal_eps}
        kind = self._checked_variant(variants.from_fields(variant, settings), dropout)
        if kind.reads_weight and (problem := self.base_kind.unreadable(self.get_base_layer())) is not None:
            raise ConfigError(f"{variant} reads the base weight, and {problem}; use variant bat-row, which reads none")
        shape = kind.block_shape(
            int(self.out_features), int(self.in_features), r, mini_r
        )  # some hosts count in tensors

        offloading.stop_offloading(self.bone_block)  # its hook would not know the new block
        self.bone_r[adapter_name], self.bone_variant[adapter_name], self.bone_scale[adapter_name] = r, kind, 1.0
        self.bone_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.bone_block[adapter_name] = nn.Parameter(torch.zeros(shape))
        if not init_weights:
            variants.random_block_(self.bone_block[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name, keep_dtype=False)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _kind_of(self, base: nn.Module) -> BaseKind:
        return linear_kind(base, self.kwargs.get("get_apply_tensor_subclass"))

    def _checked_variant(self, variant: variants.Variant, dropout: float) -> variants.Variant:
        """The variant for this kind of layer.

        Raises:
            ConfigError: this kind of layer does not support the variant or the dropout.
        """
        return variant

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, keep_dtype: bool = True
    ) -> None:
        """PEFT's hook. A block that was loaded over a meta tensor keeps the dtype of its file, not the base's."""
        if adapter_name not in self.bone_block:  # PEFT calls this on every layer
            return
        # An offloaded base is on the meta device; a block must not follow it there.
        base = self.get_base_layer()
        device = offloading.execution_device(base) if device is None else device
        if device is None and not (hasattr(base, "weight") or hasattr(base, "qweight")):  # the only ones PEFT looks for
            device = getattr(self.base_parameter(), "device", None)
        before = self.bone_block[adapter_name].data
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        block = self.bone_block[adapter_name]
        if keep_dtype and block.dtype != before.dtype:
            block.data = before.to(block.device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = adapter_names if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        super().set_adapter(names, inference_mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply what the adapter adds by `scale`; 1 is the trained strength. A merged adapter keeps its strength."""
        if adapter in self.bone_scale:
            self.bone_scale[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale`."""
        for name in self.active_here():
            self.bone_scale[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters by `scale`; None resets them to 1."""
        for name in self.active_here():
            self.bone_scale[name] = 1.0 if scale is None else self.bone_scale[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.converts_to_lora and self.base_kind.unreadable(self.get_base_layer()) is None


class BoneLinear(BaseAttributes, nn.Module, BoneLayer):
    """A `torch.nn.Linear` or transformers `Conv1D` with adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, r: int = 0, init_weights: bool | str = True, **kwargs: Any
    ) -> None:
        super().__init__()
        BoneLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, init_weights, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output with the moves of all active adapters; x (..., in) -> (..., out).

        With `adapter_names`, a list with a name for each row of x, each row gets the moves of its adapter instead.
        """
        if CURRENT.rows is not None or "adapter_names" in kwargs:
            return self._forward_by_rows(x, *args, **kwargs)
        kept = self._kept(x)
        if kept is not None and (plan := kept.plan) is not None and not (args or kwargs) and plan.holds(self, x):
            return plan(x)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        modules: Any = self._modules  # attributes of modules are looked up in a chain of Python calls
        base_layer, bone_block, active = modules["base_layer"], modules["bone_block"], self._active_adapter
        names = [name for name in ((active,) if isinstance(active, str) else active) if name in bone_block]
        if self._disable_adapters or self.merged_adapters or not names:
            return base_layer(x, *args, **kwargs)
        blocks = [self.block_of(name) for name in names]
        if kept is not None and any(type(block) is not nn.Parameter for block in blocks):
            kept = NOTHING  # functional_call's
        moves = Moves(x, kept, self.backend)
        for name, block in zip(names, blocks, strict=True):
            adapter_x = self._with_dropout(name, x) if self.training else x
            self.bone_variant[name].move(moves, adapter_x, block, self.bone_scale[name])
        refetch = moves.shifts_weight and self._is_refetched()
        base, plain = self._base_call(base_layer, refetch, args, kwargs)
        y = moves.run(base, self._weight_and_bias, plain, refetch)
        if plain:
            keep_plan(self, names, moves, base, kept)
        return y

    def _base_call(self, base_layer: Any, refetch: bool, args: tuple, kwargs: dict) -> tuple[Callable, bool]:
        """What computes the base's output, and whether it is a plain product (see `Moves.run`)."""
        if not (refetch or args or kwargs) and is_plain(base_layer):
            return self.base_kind.product(base_layer), True
        call = self.base_kind.caller(base_layer)
        return (lambda base_x: call(base_x, *args, **kwargs)) if args or kwargs else call, False

    def _forward_by_rows(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        rows = self.row_names if adapter_names is None else RowNames(adapter_names)
        if rows is None:
            return self.forward(x, *args, **kwargs)
        base_layer = self.base_layer
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return base_layer(x, *args, **kwargs)
        self.check_rows()
        groups = rows.groups(len(x))
        x = rows.sorted(x)
        parts = []
        for name, start, size in groups:
            if name in self.bone_block:
                moves = Moves(x.narrow(0, start, size), self._kept(x, name), self.backend)
                self.bone_variant[name].move(moves, moves.x, self.block_of(name), self.bone_scale[name])
                parts.append(Part(start, size, moves, name))
        refetch = self._is_refetched()
        base, plain = self._base_call(base_layer, refetch, args, kwargs)
        return rows.restored(run_by_rows(x, parts, base, self._weight_and_bias, plain, refetch, self._kept(x)))

    def _with_dropout(self, name: str, x: Tensor) -> Tensor:
        dropout = self.bone_dropout[name]
        return dropout(x) if isinstance(dropout, nn.Dropout) else x

    def _kept(self, x: Tensor, part: str = "") -> Kept | None:
        """What this layer, or its part of an adapter, keeps in this call; None in training."""
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return None
        if not self.caches:
            return NOTHING
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # its graph would read what was dropped
            return NOTHING
        return calls.kept_by(self, part)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        if not offloading.is_sharded_or_offloaded(base):
            return self.base_kind.weight(base), parameter_of(base, "bias")
        offloading.prepare_reading(base, self)
        with offloading.whole(base):
            return self.base_kind.weight(base).detach(), base.bias

    def _is_refetched(self) -> bool:
        base = self.get_base_layer()
        return offloading.is_sharded_or_offloaded(base) or self.base_kind.is_refetched(base)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        check_loadable(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {self.bone_variant[n].name} r={r}" for n, r in self.bone_r.items())

    def __repr__(self) -> str:
        return "bone." + super().__repr__()


def bone_layers(model: nn.Module) -> Iterator[tuple[str, BoneLinear]]:
    """The layers with adapters of the family, each with its name in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, BoneLinear):
            yield name, module
