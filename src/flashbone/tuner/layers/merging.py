"""Merging one layer: adapters into its base weight and out again, bit for bit, in PEFT's terms."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from flashbone import shards, variants
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.adapted import AdaptedLayer
from flashbone.tuner.layers.merged_base import check_not_written, fingerprint
from flashbone.variants.merged import Term, check_undoable, undo


def _on_whole_weights(write: bool = False) -> Callable[[Callable], Callable]:
    """Run the method without grad on whole parameters, where hosts shard or offload them; `write`: it changes the
    base."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def on_whole_weights(self: MergeableLayer, *args: Any, **kwargs: Any) -> Any:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                offloading.whole(self.get_base_layer(), write),
                offloading.whole(self.bone_block),
            ):
                return method(self, *args, **kwargs)

        return on_whole_weights

    return decorate


class MergeableLayer(AdaptedLayer):
    """Merging for `BoneLayer`, which holds the adapters.

    Attributes:
        keep_original: Whether a merge keeps the pristine weight in host memory (the default), so that unmerging is
            bit-exact. Where memory is short, set it to False before merging: unmerging then recomputes the base, with
            rounding. The original of a quantised base is small and always kept.
    """

    keep_original = True
    _original_weight: Any = None
    merged_bits: Any = None  # the fingerprint of the merged weight

    @property
    def keeps_original(self) -> bool:
        """Whether the next merge keeps the original."""
        return self.keep_original or self.base_kind.always_keeps_original

    @_on_whole_weights()
    def get_delta_weight(self, adapter: str, orig_weight: Tensor | None = None) -> Tensor:
        """What merging the adapter adds to the base weight, in the base's layout.

        Args:
            adapter: Its name.
            orig_weight: The weight to merge into; None takes the pristine base weight, also while merged.

        Returns:
            A new tensor in fp32 (fp64 for an fp64 base); in `orig_weight`'s dtype if that was given.
        """
        W = self.pristine_weight() if orig_weight is None else self.base_kind.matrix(orig_weight.detach())
        block = self.bone_block[adapter].detach()
        dtype = shards.opmath_dtype(W, block)
        variant, scale = self.bone_variant[adapter], self.bone_scale[adapter]
        delta = variant.delta(W.to(dtype), block.to(W.device, dtype)) * scale
        delta = delta if orig_weight is None else delta.to(orig_weight.dtype)
        return self.base_kind.stored(delta, self.get_base_layer())

    @_on_whole_weights()
    def check_merge(self, adapter_names: list[str], must_be_finite: bool, undoable: bool) -> None:
        """Check, without changing anything, that these adapters can be merged: to finite values, and so that the
        pristine weight can be recomputed.

        Raises:
            FlashboneError: as `merge` does.
        """
        names = self._to_merge(adapter_names)
        if names and (must_be_finite or undoable):
            self._merged_weight(names, must_be_finite, undoable)
        elif names:
            self.base_kind.check_writable(self.get_base_layer())
            check_not_written(self)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in dict.fromkeys(names) if n in self.bone_block and n not in self._merged_as]

    def _merged_weight(self, names: list[str], must_be_finite: bool, undoable: bool = False) -> Tensor:
        """W with these adapters and those that are merged, each as it was merged; checked."""
        check_not_written(self)
        self.base_kind.check_writable(self.get_base_layer())
        terms = self._merged_as | self._as_now(names)
        pristine, where = self.pristine_weight(), f"adapter {', '.join(map(repr, terms))}"
        merged = variants.merged_weight(pristine, terms.values(), where, must_be_finite)
        if undoable:
            check_undoable(pristine, merged, terms.values())
        return merged

    @_on_whole_weights(write=True)
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight.

        Every delta refers to the pristine weight, so the order of merges does not matter.

        Args:
            safe_merge: Raise, and change nothing, if the result would hold NaN or infinity.
            adapter_names: The adapters to merge; None takes the active ones.

        Raises:
            NonFiniteError: see `safe_merge`.
            ConfigError: the base weight cannot be set, or see `check_not_written`.
            FlashboneError: `keep_original` is off, and the pristine weight could not be recomputed.
        """
        check_adapters_to_merge(self, adapter_names)  # PEFT's warnings
        names = self._to_merge(adapter_names)
        if not names:
            return
        merged = self._merged_weight(names, safe_merge, undoable=not self.keeps_original)
        now = {n: (v, block.clone(), scale) for n, (v, block, scale) in self._as_now(names).items()}
        self._become(self._merged_as | now, merged)

    def _become(self, merged_as: dict[str, Term], merged: Tensor) -> None:
        """Be merged with these adapters; if it fails or is interrupted, base and layer are as they were."""
        base, kind = self.get_base_layer(), self.base_kind
        held, before = kind.hold(base), (self._original_weight, self._merged_as, self.merged_adapters, self.merged_bits)
        try:
            if self.keeps_original and self._original_weight is None:
                if self.merged:  # by a merge that kept no original
                    kind.write(base, self._unmerged_by_subtraction())
                self._original_weight = kind.keep(base)
            kind.write(base, merged)
            self._merged_as, self.merged_adapters = merged_as, list(merged_as)
            self.merged_bits = fingerprint(self.base_parameter())
        except BaseException:
            self._original_weight, self._merged_as, self.merged_adapters, self.merged_bits = before
            kind.restore(base, held)
            raise

    @_on_whole_weights(write=True)
    def go_back(self, merged_as: dict[str, Term]) -> None:
        """Be merged with fewer adapters, those that `merged_as` held before."""
        if self._merged_as.keys() != merged_as.keys():
            if merged_as:
                self._become(merged_as, variants.merged_weight(self.pristine_weight(), merged_as.values()))
            else:
                self.unmerge()

    @_on_whole_weights(write=True)
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again: bit for bit where the original was kept.

        Raises:
            ConfigError: see `check_not_written`.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        check_not_written(self)
        base = self.get_base_layer()
        if self._original_weight is not None:
            self.base_kind.restore(base, self._original_weight)
        else:
            self.base_kind.write(base, self._unmerged_by_subtraction())
        self._original_weight, self.merged_bits = None, None
        self._merged_as = {}
        self.merged_adapters = []

    @_on_whole_weights()
    def check_unmerge(self) -> None:
        """
        Raises:
            ConfigError: see `check_not_written`.
        """
        check_not_written(self)

    @_on_whole_weights(write=True)
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare base layer, with the adapters merged into it if `merge`; no original is kept."""
        if merge:
            check_adapters_to_merge(self, adapter_names)  # PEFT's warnings
            if names := self._to_merge(adapter_names):
                self.base_kind.write(self.get_base_layer(), self._merged_weight(names, safe_merge))
        return self.get_base_layer()

    def pristine_weight(self) -> Tensor:
        """The base's weight (out, in) without any adapter, detached, on the base's device."""
        base = self.get_base_layer()
        if self._original_weight is not None:
            return self.base_kind.kept_weight(base, self._original_weight)
        return self._unmerged_by_subtraction() if self.merged else self.base_kind.weight(base).detach()

    def _as_now(self, names: list[str]) -> dict[str, Term]:
        return {n: (self.bone_variant[n], self.bone_block[n].detach(), self.bone_scale[n]) for n in names}

    def _unmerged_by_subtraction(self) -> Tensor:
        return undo(self.base_kind.weight(self.get_base_layer()).detach(), self._merged_as.values())
