"""Adapter folders of PEFT's MISS (PEFT 0.17 and newer): three members of the family under another prefix.

adapter_config.json: peft_type "MISS", r, init_weights, mini_r, bias, miss_dropout; besides what every folder of PEFT
has (`folders.py`),

    base_model.model.<module>.miss_block        the block of an adapted linear layer

`init_weights` chooses the variant: true or false (a random start) is bone, "bat" is bat-col, "mini" is mini. All
layers are linear, and have one r.
"""

from pathlib import Path
from typing import Any

from flashbone import variants
from flashbone.files import cards, fields
from flashbone.files.adapter import Adapter, AdapterFormat
from flashbone.files.blocks import BlockFolder, block_sizes, mini_r, refuse
from flashbone.files.fields import ConfigField

_BY_INIT = {"bat": "bat-col", "mini": "mini"}
_BY_VARIANT = {name: init for init, name in _BY_INIT.items()} | {"bone": True}


def variant_name(init_weights: object) -> str | None:
    """The variant that a MISS config's `init_weights` chooses; None for what PEFT does not know."""
    if isinstance(init_weights, bool):
        return "bone"
    return _BY_INIT.get(init_weights) if isinstance(init_weights, str) else None


class MissFolder(BlockFolder):
    """A folder of MISS."""

    method, bias_only, dropout = "MISS", "MiSS_only", "miss_dropout"
    block = ".miss_block"
    schema = fields.SHARED | {
        "r": fields.size(64),
        "mini_r": fields.size(1),
        "init_weights": ConfigField(
            lambda v: variant_name(v) is not None, f"true, false, {' or '.join(map(repr, _BY_INIT))}", True
        ),
        "miss_dropout": fields.PROBABILITY,
        "bias": ConfigField(
            lambda v: isinstance(v, str) and (v in ("none", "all") or v.endswith("_only")),
            "'none', 'all' or 'MiSS_only'",
            "none",
        ),
    }

    def variant(self, file: Path, config: dict[str, Any]) -> variants.Variant:
        name = variant_name(config["init_weights"])
        assert name is not None, "the config was checked"
        return variants.get(name)

    def fill(self, adapter: Adapter, config: dict[str, Any]) -> None:
        """PEFT's own limits on sizes are known only in part here; PEFT refuses such layers itself."""
        name = adapter.variant.name
        r, others = block_sizes(adapter)
        others_only = f"MISS has bone, mini and bat-col only; keep it as BONE, or convert it to {_way_out(name)}"
        reasons: dict[str, Any] = {
            others_only: name not in _BY_VARIANT,
            "its layers are linear, embeddings are not": adapter.transposed,
            "it adapts modules, no single parameters": adapter.parameters - adapter.transposed,
            f"it has one r for all layers, here {r}, which some do not have": others,
            "it holds whole modules and biases, no single parameters": config.pop("parameters_to_save"),
            "PEFT's sizes have to be multiples of the block's": _misfits(adapter),
        }
        refuse(adapter, reasons, "MISS")
        config |= {"r": r, "mini_r": mini_r(adapter, "MISS"), "init_weights": _BY_VARIANT[name]}
        if name == "bone" and adapter.config.get("init_weights") is False:
            config["init_weights"] = False


def _way_out(variant: str) -> str:
    return "rwkv-peft or to a LoRA" if variant == "bat-row" else "a LoRA"


def _misfits(adapter: Adapter) -> list[str]:
    """Layers whose bias shows that PEFT's bat and mini do not allow their number of outputs."""
    misfits = []
    for name, block in adapter.blocks.items():
        bias = adapter.replacements.get(f"{name}.bias")
        if bias is None or bias.ndim != 1 or adapter.variant.name not in ("bat-col", "mini"):
            continue
        if len(bias) % block.shape[-1]:
            misfits.append(f"{name} has {len(bias)} outputs, a block {block.shape[-1]}")
    return misfits


FOLDER = MissFolder()
BLOCK = FOLDER.block
read, write = FOLDER.read, FOLDER.write


def _usage(card: cards.AdapterCard) -> str:
    how = "the model is of a class of flashbone" if card.is_rwkv else "without flashbone"
    load = cards.part("Load", f"PEFT 0.17 and newer, {how}:", cards.load(card))
    convert = cards.part("Convert", cards.shell("flashbone convert ADAPTER OUT --to peft"))
    return load + convert + cards.merging(card)


FORMAT = AdapterFormat("miss", Adapter, read, write, _usage, peft_type="MISS")
