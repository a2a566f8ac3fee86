"""Adapter folders of BONE, as PEFT 0.14 to 0.18 wrote it and as flashbone writes it. Nothing of PEFT is imported.

adapter_config.json: peft_type "BONE", r, variant (ours) or init_weights (PEFT's own), rank_pattern, bias, ...; besides
what every folder of PEFT has (`folders.py`),

    base_model.model.<name>.bone_block          the block of an adapted module, or parameter (target_parameters)
    base_model.model.<name>.bone_transposed     the same where the weight is stored as (in, out): embeddings
    base_model.model.<parameter>                also a single parameter that is listed in parameters_to_save
"""

import re
from pathlib import Path
from typing import Any

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import cards, fields
from flashbone.files.adapter import Adapter, AdapterFormat
from flashbone.files.blocks import BlockFolder, block_sizes, mini_r
from flashbone.files.fields import ConfigField
from flashbone.files.folders import CONFIG, PICKLE, ROOT, SAFETENSORS, weights_file
from flashbone.variants.orthogonal import DEFAULT_EPS, MAX_EPS, Orthogonal

__all__ = ["BLOCK", "BLOCK_OF_TRANSPOSED", "CONFIG", "PICKLE", "ROOT", "SAFETENSORS", "read", "weights_file", "write"]

BLOCK, BLOCK_OF_TRANSPOSED = ".bone_block", ".bone_transposed"
DEFAULT_R = 64


class BoneFolder(BlockFolder):
    """A folder of BONE."""

    method, bias_only, dropout = "BONE", "bone_only", "dropout"
    block, transposed_block = BLOCK, BLOCK_OF_TRANSPOSED
    schema = fields.SHARED | {
        "r": fields.size(DEFAULT_R),
        "bottleneck_size": ConfigField(fields.is_size, "a positive integer or null"),
        "mini_r": fields.size(1),
        "use_orthogonal": fields.flag(True),
        "orthogonal_eps": ConfigField(
            lambda v: isinstance(v, float) and 0 < v <= MAX_EPS, f"a number in (0, {MAX_EPS}]", DEFAULT_EPS
        ),
        "dropout": fields.PROBABILITY,
        "bias": fields.bias("bone_only"),
        "target_parameters": fields.NAMES,
        "parameters_to_save": fields.NAMES,
        "rank_pattern": fields.patterns(fields.is_size, "positive integers"),
        "init_weights": ConfigField(lambda v: isinstance(v, bool) or v == "bat", "true, false or 'bat'", True),
        "variant": ConfigField(lambda v: isinstance(v, str), "a name"),
    }

    def variant(self, file: Path, config: dict[str, Any]) -> variants.Variant:
        """Named by `variant`; PEFT 0.14 to 0.18 have no such field and mean bat-col by `init_weights="bat"`, else bone.
        As in a BoneConfig, a `bottleneck_size` means orthogonal, and is its spelling of r."""
        name, is_bat, bottleneck = config.get("variant"), config["init_weights"] == "bat", config.get("bottleneck_size")
        if bottleneck is not None and config["r"] == DEFAULT_R:
            config["r"] = bottleneck
        if bottleneck not in (None, config["r"]):
            raise FormatError(f"{file}: bottleneck_size: got {bottleneck!r}, wanted r, which is {config['r']!r}")
        if name in (None, "", "bone"):
            name = "bat-col" if is_bat else "bone" if bottleneck is None else Orthogonal.name
        if name not in variants.VARIANTS:
            known = ", ".join(map(repr, variants.VARIANTS))
            raise FormatError(
                f"{file}: variant: got {name!r}, wanted one of {known}; was it written by a newer flashbone?"
            )
        if is_bat and name != "bat-col":
            raise FormatError(f"{file}: init_weights 'bat' means the variant 'bat-col', but variant is {name!r}")
        if name != Orthogonal.name:
            return variants.get(name)
        return variants.get(name, use_orthogonal=config["use_orthogonal"], eps=config["orthogonal_eps"])

    def fill(self, adapter: Adapter, config: dict[str, Any]) -> None:
        """BONE holds every adapter."""
        pattern, is_own = config["rank_pattern"] or {}, adapter.config.get("peft_type") == self.method
        sizes = {name: block.shape[-2] for name, block in adapter.blocks.items()}
        if not is_own or any(fields.by_pattern(n, pattern, config["r"] or 0) != size for n, size in sizes.items()):
            config["r"], others = block_sizes(adapter)
            config["rank_pattern"] = {f"^{re.escape(n)}": size for n, size in others.items()}  # these blocks alone
        config |= {"variant": adapter.variant.name, "mini_r": mini_r(adapter, "BONE")}
        starts_at_zero = adapter.config.get("init_weights") is not False
        config["init_weights"] = "bat" if adapter.variant.name == "bat-col" else starts_at_zero
        named = config["target_parameters"] or []
        if any(fields.is_targeted(name, named) != (name in adapter.parameters) for name in sizes):
            named = sorted(adapter.parameters)
        config["target_parameters"] = named or None
        if isinstance(adapter.variant, Orthogonal):
            config |= {"use_orthogonal": adapter.variant.use_orthogonal, "orthogonal_eps": adapter.variant.eps}
        if config["bottleneck_size"] != config["r"] or not isinstance(adapter.variant, Orthogonal):
            del config["bottleneck_size"]


FOLDER = BoneFolder()
read, write = FOLDER.read, FOLDER.write

# What plain PEFT asks of a layer's sizes, which flashbone does not.
_SIZES = {"bat-col": " if r divides the sizes of its layers", "mini": " if mini_r divides the outputs of its layers"}


def _usage(card: cards.AdapterCard) -> str:
    words, commands = _ways_out(card)
    without = [" ".join(words), *([cards.shell(*commands)] if commands else [])]
    load = cards.part("Load with flashbone", cards.load(card, with_bone=True))
    return load + cards.part("Load without flashbone", *without) + cards.merging(card)


def _ways_out(card: cards.AdapterCard) -> tuple[list[str], list[str]]:
    """The sentences on life without flashbone, and the conversions that will not be refused."""
    words, commands = [], []
    # PEFT's BONE and MISS have linear layers and one r; only flashbone's classes of RWKV have such names.
    plain = card.linear_only and len(card.r) == 1 and not card.is_rwkv
    sizes = _SIZES.get(card.variant or "", "")
    if plain and card.variant in ("bone", "bat-col"):
        words.append(f"PEFT 0.14 to 0.18 loads it as it is{sizes}.")
    if plain and card.variant in ("bone", "mini", "bat-col"):
        commands.append("flashbone convert ADAPTER OUT --to miss")
        words.append(f"Plain PEFT 0.17 and newer loads it after `--to miss`{sizes}.")
    if card.fits_lora and not card.is_rwkv:
        exact = card.variant in ("bone", "mini")
        commands.append("flashbone convert ADAPTER OUT --to lora --base BASE" + ("" if exact else " --error 0.01"))
        how = "exactly" if exact else "approximately, to the error that is asked for"
        who = "Anything that serves LoRAs" if card.linear_only else "PEFT"
        words.append(f"{who} loads it, {how}, after `--to lora`.")
    if card.fits_rwkv and card.variant in ("bone", "bat-row"):
        commands.append("flashbone convert ADAPTER OUT --to rwkv-peft")
        words.append("RWKV-PEFT reads it after `--to rwkv-peft`.")
    return [*words, "Merged into its base, as below, it always is part of a plain model."], commands


FORMAT = AdapterFormat("peft", Adapter, read, write, _usage, peft_type="BONE")
