"""BoneLayer and BoneLinear: a linear layer with any number of adapters of the family, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.ops.cache import Cache
from flashbone.ops.moves import Moves
from flashbone.ops.rows import Part, run_by_rows
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.kinds import LINEAR, TRANSPOSED, BaseKind, is_plain
from flashbone.tuner.layers.merging import MergeableLayer
from flashbone.tuner.layers.mixed_batch import RowNames
from flashbone.tuner.layers.quantized import linear_problem, quantized_kind_of
from flashbone.variants.orthogonal import DEFAULT_EPS, Orthogonal


class BoneLayer(MergeableLayer):
    """The adapters of one layer: blocks, sizes, scales and dropouts by adapter name; merging is in `merging.py`.

    `caches` (default True): in eval mode without grad, what is built from blocks and weights is kept between calls
    until one of them changes: sums of the blocks of several adapters, and, for calls with few tokens, bat-col's
    shifted weight, which is as large as the base's.
    """

    in_features: int
    out_features: int
    base_layer: nn.Module

    converts_to_lora = True  # whether a linear layer of LoRA could stand in its place
    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_r", "bone_mini_r", "bone_variant", "bone_scale", "bone_dropout")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.bone_r: dict[str, int] = {}
        self.bone_mini_r: dict[str, int] = {}
        self.bone_variant: dict[str, variants.Variant] = {}
        self.bone_scale: dict[str, float] = {}
        self.bone_dropout = nn.ModuleDict()
        self.bone_block = nn.ParameterDict()
        self._disable_adapters = False
        self.caches = True
        self.row_names: RowNames | None = None  # set for the time of a call of the model with adapter_names
        self.backend = "torch"
        self._cache = Cache()
        self.cast_input_dtype_enabled = True
        self._init_merging()
        self.kwargs = kwargs

        base = self.get_base_layer()
        self._kind = self._kind_of(base)
        self.out_features, self.in_features = self._kind.sizes(base)

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
            orthogonal_eps: The ridge of that.

        Raises:
            ConfigError: r or the variant is out of range.
            ShapeError: the variant does not exist at this layer's sizes.
        """
        if r <= 0:
            raise ConfigError(f"`r` should be a positive integer value but the value passed is {r}")
        variant = variant or ("bat-col" if init_weights == "bat" else "bone")
        settings = {"use_orthogonal": use_orthogonal, "eps": orthogonal_eps} if variant == Orthogonal.name else {}
        kind = self._fitted(variants.get(variant, **settings), dropout)
        if kind.reads_weight and (problem := self._kind.unreadable(self.get_base_layer())) is not None:
            raise ConfigError(f"{variant} reads the base weight, and {problem}; use variant bat-row, which reads none")
        shape = kind.block_shape(self.out_features, self.in_features, r, mini_r)

        offloading.keep_here(self.bone_block)  # whose hook would not know the new one
        self.bone_r[adapter_name], self.bone_mini_r[adapter_name] = r, mini_r
        self.bone_variant[adapter_name], self.bone_scale[adapter_name] = kind, 1.0
        self.bone_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.bone_block[adapter_name] = nn.Parameter(torch.zeros(shape))
        if not init_weights:
            variants.random_block_(self.bone_block[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name, keep_dtype=False)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def base_parameter(self) -> Any:
        """The base's parameter that is adapted, as the base holds it."""
        return self._kind.parameter(self.get_base_layer())

    def _kind_of(self, base: nn.Module) -> BaseKind:
        if (problem := linear_problem(base)) is not None:
            raise ConfigError(f"a Bone adapter cannot be put on this layer: {problem}")
        quantized = quantized_kind_of(base, self.kwargs.get("get_apply_tensor_subclass"))
        return quantized or (TRANSPOSED if isinstance(base, Conv1D) else LINEAR)

    def _fitted(self, variant: variants.Variant, dropout: float) -> variants.Variant:
        """The variant as this kind of layer has it.

        Raises:
            ConfigError: this kind of layer cannot have it, or cannot have the dropout.
        """
        return variant

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, keep_dtype: bool = True
    ) -> None:
        """PEFT's hook, also for blocks that were loaded in the place of meta tensors: these keep the dtype of their
        file, which PEFT would round to the base's."""
        if adapter_name not in self.bone_block:  # PEFT asks every layer
            return
        # An offloaded base is on the meta device: a block that followed it there would lose its numbers.
        base = self.get_base_layer()
        device = offloading.execution_device(base) if device is None else device
        if device is None and not (hasattr(base, "weight") or hasattr(base, "qweight")):  # PEFT looks for no other
            device = getattr(self.base_parameter(), "device", None)
        before = self.bone_block[adapter_name].data
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        block = self.bone_block[adapter_name]
        if keep_dtype and block.dtype != before.dtype:
            block.data = before.to(block.device)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._cache.clear()
        super().set_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._cache.clear()
        super().delete_adapter(adapter_name)

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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.converts_to_lora and self._kind.unreadable(self.get_base_layer()) is None

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.bone_block]


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
        """The base's output with the moves of all active adapters; x (..., in) -> (..., out).

        With `adapter_names`, a list with a name for each row of x, with the moves of each row's own adapter instead.
        """
        if self.row_names is not None or "adapter_names" in kwargs:
            return self._forward_by_rows(x, *args, **kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        bone_block = self.bone_block
        active = [name for name in self.active_adapters if name in bone_block]
        if self._disable_adapters or self.merged_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        base_layer = self.base_layer
        moves = Moves(x, self._usable_cache(x), self.backend)
        for name in active:
            seen = self._dropped(name, x) if self.training else x
            self.bone_variant[name].move(moves, seen, self._block(name), self.bone_scale[name])
        call = self._kind.caller(base_layer)
        base = (lambda base_x: call(base_x, *args, **kwargs)) if args or kwargs else call
        refetch = moves.shifts_weight and self._is_refetched()
        return moves.run(base, self._weight_and_bias, is_plain(base_layer), refetch)

    def _forward_by_rows(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = kwargs.pop("adapter_names", None)
        rows = self.row_names if given is None else RowNames(given)
        base_layer = self.base_layer
        if rows is None or self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return base_layer(x, *args, **kwargs)
        if self.training:
            raise ConfigError("adapter_names: the layer is in training mode; call eval() first")
        if self.merged_adapters:
            raise ConfigError("adapter_names: adapters stand merged, so that no row can be without; unmerge them first")
        groups = rows.groups(len(x))
        x = rows.sorted(x)
        parts, cache = [], self._usable_cache(x)
        for name, start, size in groups:
            if name in self.bone_block:
                own_cache = None if cache is None else cache.part(name)  # an empty one is false
                moves = Moves(x.narrow(0, start, size), own_cache, self.backend)
                self.bone_variant[name].move(moves, moves.x, self._block(name), self.bone_scale[name])
                parts.append(Part(start, size, moves))
        call = self._kind.caller(base_layer)
        base = (lambda base_x: call(base_x, *args, **kwargs)) if args or kwargs else call
        refetch = self._is_refetched()
        plain = is_plain(base_layer) and not refetch
        return rows.restored(run_by_rows(x, parts, base, self._weight_and_bias, plain, refetch))

    def _block(self, name: str) -> Tensor:
        # Past ParameterDict's look-up, a chain of Python calls that decoding feels. Hosts that shard, offload,
        # replicate or parametrise keep a parameter elsewhere.
        block: Any = self.bone_block._parameters.get(name)
        return block if offloading.is_simply_there(block) else offloading.for_autograd(self.bone_block, name, self)

    def _dropped(self, name: str, x: Tensor) -> Tensor:
        dropout = self.bone_dropout[name]
        return dropout(x) if isinstance(dropout, nn.Dropout) else x

    def _usable_cache(self, x: Tensor) -> Cache | None:
        if torch.compiler.is_compiling() or "_is_replica" in self.__dict__:  # nn.DataParallel's replicas share theirs
            return None
        if not self.caches or self.training or torch.is_grad_enabled():
            self._cache.clear()
            return None
        # Sharding hosts exchange what a parameter holds without torch's version counter; and a CUDA graph would go on
        # reading what the cache has dropped.
        if (dist.is_available() and dist.is_initialized()) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return self._cache

    def train(self, mode: bool = True) -> BoneLinear:
        self._cache.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> BoneLinear:
        self._cache.clear()
        return super()._apply(*args, **kwargs)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        if not offloading.comes_and_goes(base):
            return self._kind.weight(base), base.bias
        offloading.prepare_reading(base, self)
        with offloading.whole(base):
            return self._kind.weight(base).detach(), base.bias

    def _is_refetched(self) -> bool:
        base = self.get_base_layer()
        return offloading.comes_and_goes(base) or self._kind.is_refetched(base)

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {self.bone_variant[n].name} r={r}" for n, r in self.bone_r.items())

    def __repr__(self) -> str:
        return "bone." + super().__repr__()


def bone_layers(model: nn.Module) -> Iterator[tuple[str, BoneLinear]]:
    """The layers with adapters of the family, each with its name in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, BoneLinear):
            yield name, module
