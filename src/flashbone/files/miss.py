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
from flashbone.files.adapter import Adapter
from flashbone.files.blocks import BlockFolder, block_sizes, mini_r, refuse
from flashbone.files.fields import ConfigField
from flashbone.files.formats import AdapterCard, AdapterFormat

_BY_INIT = variants.by_tool_name("miss_init_weights")


def variant_name(init_weights: object) -> str | None:
    """The variant that a MISS config's `init_weights` chooses; None for what PEFT does not know."""
    known = isinstance(init_weights, bool | str) and (init_weights is False or init_weights in _BY_INIT)
    return _BY_INIT[init_weights or True].name if known else None


class MissFolder(BlockFolder):
    """A folder of MISS."""

    method, bias_only, dropout = "MISS", "MiSS_only", "miss_dropout"
    block = ".miss_block"
    schema = fields.SHARED | {
        "r": fields.size(64),
        "mini_r": fields.size(1),
        "init_weights": ConfigField(lambda v: variant_name(v) is not None, "true, false, 'bat' or 'mini'", True),
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
        init = adapter.variant.miss_init_weights
        r, others = block_sizes(adapter)
        way_out = "rwkv-peft or to a LoRA" if adapter.variant.rwkv_peft_mode else "a LoRA"
        known = ", ".join(kind.name for kind in _BY_INIT.values())
        reasons: dict[str, Any] = {
            f"MISS has {known} only; keep it as BONE, or convert it to {way_out}": init is None,
            "its layers are linear, embeddings are not": adapter.transposed,
            "it adapts modules, no single parameters": adapter.parameters - adapter.transposed,
            f"it has one r for all layers, here {r}, which some do not have": others,
            "it holds whole modules and biases, no single parameters": config.pop("parameters_to_save"),
            "PEFT's sizes have to be multiples of the block's": _misfits(adapter),
        }
        refuse(adapter, reasons, "MISS")
        config |= {"r": r, "mini_r": mini_r(adapter, "MISS"), "init_weights": init}
        if init is True and adapter.config.get("init_weights") is False:
            config["init_weights"] = False


def _misfits(adapter: Adapter) -> list[str]:
    """Layers whose bias shows that PEFT's bat and mini do not allow their number of outputs."""
    misfits = []
    for name, block in adapter.blocks.items():
        bias = adapter.replacements.get(f"{name}.bias")
        if bias is None or bias.ndim != 1 or not adapter.variant.peft_size_condition:
            continue
        if len(bias) % block.shape[-1]:
            misfits.append(f"{name} has {len(bias)} outputs, a block {block.shape[-1]}")
    return misfits


FOLDER = MissFolder()
BLOCK = FOLDER.block
read, write = FOLDER.read, FOLDER.write


def _usage(card: AdapterCard) -> str:
    how = "the model is of a class of flashbone" if card.is_rwkv else "without flashbone"
    load = cards.part("Load", f"PEFT 0.17 and newer, {how}:", cards.load(card))
    convert = cards.part("Convert", cards.shell("flashbone convert . ../peft --to peft"))
    return load + convert + cards.merging(card)


FORMAT = AdapterFormat("miss", Adapter, read, write, _usage, peft_type="MISS")
