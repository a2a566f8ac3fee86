"""Checks before a merge of a whole model: would it fail, or change layers without an adapter?"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from flashbone.errors import ConfigError, FlashboneError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import bone_layers


@torch.inference_mode(False)
@torch.no_grad()
def check_merge(tuner: BaseTuner, adapter_names: list[str] | None, safe_merge: bool, unload: bool = False) -> None:
    """Check a merge of a `BoneModel`; with `safe_merge` this computes every weight, which the merge does again.

    Args:
        tuner: The model.
        adapter_names: The adapters to merge; None takes the active ones.
        safe_merge: Whether the merged weights must be finite.
        unload: Whether the merge is permanent.

    Raises:
        ConfigError: an adapter does not exist, a weight is shared or computed, or two adapters replace one parameter.
        NonFiniteError: `safe_merge`, and a weight would hold NaN or infinity.
        FlashboneError: originals are not kept, and the merge could not be undone.
    """
    if not isinstance(adapter_names, str):  # PEFT raises on a string
        unknown = [name for name in adapter_names or [] if name not in tuner.peft_config]
        if unknown:
            raise ConfigError(f"adapters to merge: no {unknown} in this model, which has {list(tuner.peft_config)}")
    _check_bases_are_their_own(tuner)
    owners: dict[int, str] = {}
    for name, layer in bone_layers(tuner.model):
        first = owners.setdefault(id(layer.base_parameter()), name)
        if first != name:
            raise ConfigError(
                f"{first} and {name} share one weight and are both adapted, so no merged weight fits both; untie"
                " them, or leave one out of target_modules"
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
        ConfigError: a layer without an adapter shares a base layer or its weight, so a merge would change it, too.
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
                    f"{adapted[base]} is adapted, and {path}.{key} uses the same weight without it, so no merged"
                    " weight fits both; untie them (tie_word_embeddings=False, and a copy of the weight),"
                    " or leave the adapter unmerged"
                )
