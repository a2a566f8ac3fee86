"""What would make a merge of a whole model fail, or change more than it should: found before any layer is touched."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from flashbone.errors import ConfigError, FlashboneError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model import saved_parameters


@torch.inference_mode(False)
@torch.no_grad()
def check_merge(tuner: BaseTuner, adapter_names: list[str] | None, safe_merge: bool, unload: bool = False) -> None:
    """Check a merge of a `BoneModel`; with `safe_merge` every weight is computed, and once more by the merge itself.

    Args:
        tuner: The model.
        adapter_names: The adapters to merge; None takes the active ones.
        safe_merge: Whether the merged weights have to be finite.
        unload: Whether the merge is for good, so that nobody takes it back.

    Raises:
        ConfigError: there is no adapter of some name, or a weight is shared or computed, or two of the adapters have a
            value of their own for one parameter.
        NonFiniteError: `safe_merge`, and a weight would hold NaN or infinity.
        FlashboneError: originals are not kept, and the merge could not be taken back.
    """
    if not isinstance(adapter_names, str):  # else PEFT says what was wanted
        unknown = [name for name in adapter_names or [] if name not in tuner.peft_config]
        if unknown:
            raise ConfigError(f"adapters to merge: no {unknown} in this model, which has {list(tuner.peft_config)}")
    for saved in saved_parameters.find(tuner.model):
        saved.check_merge(adapter_names, must_be_finite=safe_merge)
    _check_bases_are_their_own(tuner)
    owners: dict[int, str] = {}
    for name, layer in bone_layers(tuner.model):
        first = owners.setdefault(id(layer.base_parameter()), name)
        if first != name:
            raise ConfigError(
                f"{first} and {name} share one weight and are both adapted, so that no merged weight serves both;"
                " untie them, or leave one out of target_modules"
            )
        names = [*layer.merged_adapters, *(layer.active_adapters if adapter_names is None else adapter_names)]
        try:
            offloading.check_onloadable(layer.get_base_layer())
            layer.check_merge(names, must_be_finite=safe_merge, undoable=not (unload or layer.keeps_original))
        except FlashboneError as error:
            raise type(error)(f"{name}: {error}") from None


def _check_bases_are_their_own(tuner: BaseTuner) -> None:
    """
    Raises:
        ConfigError: a base layer, or its weight, is also used where no adapter is, which a merge would change, too.
    """
    adapted = {layer.get_base_layer(): name for name, layer in bone_layers(tuner.model)}
    weights = {id(layer.base_parameter()): layer.get_base_layer() for _, layer in bone_layers(tuner.model)}
    wrappers = set(adapted) | {layer for _, layer in bone_layers(tuner.model)}
    for path, module in tuner.model.named_modules():
        if module in wrappers or isinstance(module, BaseTunerLayer):
            continue
        for key, used in [*module._modules.items(), *module._parameters.items()]:
            base = used if used in adapted else weights.get(id(used))
            if base is not None:
                raise ConfigError(
                    f"{adapted[base]} is adapted, and {path}.{key} uses the same weight without it, so that no"
                    " merged weight serves both; untie them (tie_word_embeddings=False, and a copy of the weight),"
                    " or leave the adapter unmerged"
                )
