"""The cards of adapters that a live model saves, in the place of PEFT's template."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from flashbone.files import cards, peft
from flashbone.files.formats import AdapterCard
from flashbone.files.names import rwkv_lead
from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.layer import BoneLinear, bone_layers
from flashbone.tuner.model.config import BoneConfig

CARD = "README.md"


def write_cards(peft_model: Any) -> None:
    """Wrap what writes cards: `create_or_update_model_card`, which trainers call, too, for the adapter "default", whose
    folder it is; and `save_pretrained`, which saves other adapters to folders of their own."""
    peft_model.create_or_update_model_card = _with_our_part(peft_model.create_or_update_model_card)
    peft_model.save_pretrained = _with_cards_of_others(peft_model.save_pretrained)


def _with_our_part(original: Callable) -> Callable:
    @functools.wraps(original)
    def create_or_update_model_card(self: Any, output_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.peft_config.get("default"), BoneConfig):
            return original(self, output_dir, *args, **kwargs)
        return _write(self, "default", Path(output_dir))  # PEFT's template is a page of blanks

    return create_or_update_model_card


def _with_cards_of_others(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["is_main_process"]:
            for name in bound.arguments["selected_adapters"] or list(self.peft_config):
                if name != "default":
                    _write(self, name, Path(bound.arguments["save_directory"]) / name)
        return result

    return save_pretrained


def _write(model: Any, adapter_name: str, folder: Path) -> None:
    """Write or renew our part of the card of an adapter, if it is a BONE adapter; what else it says stays."""
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, BoneConfig):
        return
    folder.mkdir(parents=True, exist_ok=True)
    cards.put(_card(model, adapter_name, config), folder / CARD)


def about_base(bare: nn.Module) -> dict[str, Any]:
    """What a card says of a live base: its class in transformers, and how many classes its head tells apart."""
    is_known = isinstance(bare, PreTrainedModel)
    labels = bare.config.num_labels if is_known and type(bare).__name__.endswith("Classification") else None
    return {
        "architecture": type(bare).__name__ if is_known else "",
        "labels": labels,
        "tags": tuple(getattr(bare, "model_tags", None) or ()),
    }


def has_lora(layer: BoneLinear) -> bool:
    """Whether PEFT's LoRA has a place for an adapter of this layer."""
    return layer.converts_to_lora or isinstance(layer, BoneEmbedding)


def _card(model: Any, adapter_name: str, config: BoneConfig) -> AdapterCard:
    bare = model.get_base_model()
    layers = {name: layer for name, layer in bone_layers(bare) if adapter_name in layer.bone_block}
    saved = [name for name, module in bare.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    single = list(config.parameters_to_save or ())
    lead = rwkv_lead([*layers, *saved, *single])
    is_linear = all(layer.converts_to_lora and _is_linear(layer) for layer in layers.values())
    return AdapterCard(
        format=peft.FORMAT,
        variant=config.variant,
        r=tuple(sorted({config.r, *config.rank_pattern.values()})),
        targets=tuple(re.sub(r"(\.base_layer)+$", "", name) for name in layers),
        base=config.base_model_name_or_path or getattr(bare, "name_or_path", None) or None,
        linear_only=is_linear and not single,
        fits_lora=all(map(has_lora, layers.values())) and not single,
        fits_rwkv=is_linear and config.bias != "all" and lead is not None,
        is_rwkv=lead == "",
        task_type=config.task_type,
        **about_base(bare),
    )


def _is_linear(layer: BoneLinear) -> bool:
    """Not the (in, out) layer of GPT-2, which plain PEFT's BONE and MISS do not know."""
    return isinstance(layer.get_base_layer(), nn.Linear)
