"""Merging of a whole model, and what may not be written to it while adapters are merged."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from flashbone.errors import ConfigError
from flashbone.rwkv import time_state
from flashbone.tuner.layers.calls import changes_model
from flashbone.tuner.layers.layer import BoneLinear, bone_layers
from flashbone.tuner.layers.merged_base import check_loadable
from flashbone.tuner.model import saved_parameters
from flashbone.tuner.model.merge_checks import check_merge
from flashbone.tuner.model.saved_parameters import SavedParameter


class Merges(BaseTuner):
    """Base of BoneModel."""

    @changes_model
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (None: the active ones) into the base weights; if it fails, no layer was changed.

        Raises:
            ConfigError: an adapter of that name does not exist, or a weight is shared by two adapted layers or computed
                by a parametrisation.
            NonFiniteError: `safe_merge`, and a weight would hold NaN or infinity.
            FlashboneError: originals are not kept, and a merge could not be taken back.
        """
        self._check_merge(adapter_names, safe_merge)
        before = [(layer, dict(layer._merged_as)) for _, layer in bone_layers(self.model)]
        saved = [module for module in saved_parameters.find(self.model) if not module.merged]
        try:
            super().merge_adapter(adapter_names=adapter_names)
        except BaseException:  # KeyboardInterrupt, too
            for layer, merged_as in before:
                layer.go_back(merged_as)
            for module in saved:
                module.unmerge()
            raise

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        check_loadable(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool, unload: bool = False) -> None:
        check_merge(self, adapter_names, safe_merge, unload)
        for saved in saved_parameters.find(self.model):
            saved.check_merge(adapter_names, must_be_finite=safe_merge)

    @changes_model
    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge, unload=True)
        base: Any = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge=False, adapter_names=adapter_names
        )
        time_state.drop(base)
        return base

    @changes_model
    def unmerge_adapter(self, discard_writes: bool = False) -> None:
        """Take all merged adapters out of the base again.

        Args:
            discard_writes: Drop what was written to base weights while adapters were merged into them.

        Raises:
            ConfigError: such weights exist, and `discard_writes` is not set; no layer was changed.
        """
        for _, layer in self._merged_layers() if discard_writes else ():
            layer.merged_bits = None
        self.check_unmerge()
        super().unmerge_adapter()

    def check_unmerge(self) -> None:
        """
        Raises:
            ConfigError: a base weight was written to while adapters were merged into it.
        """
        for name, layer in self._merged_layers():
            try:
                layer.check_unmerge()
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None

    def _merged_layers(self) -> list[tuple[str, BoneLinear | SavedParameter]]:
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, (BoneLinear, SavedParameter)) and module.merged
        ]
