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
from flashbone.files.adapter import Adapter
from flashbone.files.blocks import BlockFolder, block_sizes, mini_r
from flashbone.files.fields import ConfigField
from flashbone.files.folders import CONFIG, PICKLE, ROOT, SAFETENSORS, weights_file
from flashbone.files.formats import AdapterCard, AdapterFormat
from flashbone.variants.orthogonal import DEFAULT_EPS, MAX_EPS

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
        "trainable_token_indices": fields.ANY,
        "ensure_weight_tying": fields.ANY,
        "rank_pattern": fields.patterned(fields.is_size, "positive integers"),
        "init_weights": ConfigField(lambda v: isinstance(v, bool) or v == "bat", "true, false or 'bat'", True),
        "variant": ConfigField(lambda v: isinstance(v, str), "a name"),
    }

    def variant(self, file: Path, config: dict[str, Any]) -> variants.Variant:
        """Named by `variant`; PEFT 0.14 to 0.18 have no such field and mean bat-col by `init_weights="bat"`, else bone.
        As in a BoneConfig, a `bottleneck_size` means orthogonal, and is its spelling of r."""
        name, bottleneck = config.get("variant"), config.get("bottleneck_size")
        meant = variants.by_tool_name("peft_init_weights")[config["init_weights"] or True].name
        if bottleneck is not None and config["r"] == DEFAULT_R:
            config["r"] = bottleneck
        if bottleneck not in (None, config["r"]):
            raise FormatError(f"{file}: bottleneck_size: got {bottleneck!r}, wanted r, which is {config['r']!r}")
        if name in (None, "", variants.DEFAULT):
            sized = variants.of_size_field("bottleneck_size").name
            name = sized if bottleneck is not None and meant == variants.DEFAULT else meant
        if name not in variants.VARIANTS:
            known = ", ".join(map(repr, variants.VARIANTS))
            raise FormatError(
                f"{file}: variant: got {name!r}, wanted one of {known}; was it written by a newer flashbone?"
            )
        if meant not in (variants.DEFAULT, name):
            raise FormatError(
                f"{file}: init_weights {config['init_weights']!r} means the variant {meant!r}, but variant is {name!r}"
            )
        return variants.from_fields(name, config)

    def fill(self, adapter: Adapter, config: dict[str, Any]) -> None:
        """BONE holds every adapter."""
        pattern, is_own = config["rank_pattern"] or {}, adapter.config.get("peft_type") == self.method
        sizes = {name: block.shape[-2] for name, block in adapter.blocks.items()}
        if not is_own or any(fields.by_pattern(n, pattern, config["r"] or 0) != size for n, size in sizes.items()):
            config["r"], others = block_sizes(adapter)
            config["rank_pattern"] = {f"^{re.escape(n)}": size for n, size in others.items()}  # these blocks alone
        config |= {"variant": adapter.variant.name, "mini_r": mini_r(adapter, "BONE")}
        init, starts_at_zero = adapter.variant.peft_init_weights, adapter.config.get("init_weights") is not False
        config["init_weights"] = init if isinstance(init, str) else starts_at_zero
        named = config["target_parameters"] or []
        if any(fields.is_targeted(name, named) != (name in adapter.parameters) for name in sizes):
            named = sorted(adapter.parameters)
        config["target_parameters"] = named or None
        config |= adapter.variant.settings
        if config["bottleneck_size"] != config["r"] or adapter.variant.size_field != "bottleneck_size":
            del config["bottleneck_size"]


FOLDER = BoneFolder()
read, write = FOLDER.read, FOLDER.write


def _usage(card: AdapterCard) -> str:
    words, commands = _ways_out(card)
    without = [" ".join(words), *([cards.shell(*commands)] if commands else [])]
    load = cards.part("Load with flashbone", cards.load(card, with_bone=True))
    return load + cards.part("Load without flashbone", *without) + cards.merging(card)


def _ways_out(card: AdapterCard) -> tuple[list[str], list[str]]:
    """The sentences on life without flashbone, and the conversions that will not be refused."""
    words, commands = [], []
    # PEFT's BONE and MISS have linear layers and one r; only flashbone's classes of RWKV have such names.
    plain = card.linear_only and len(card.r) == 1 and not card.is_rwkv
    kind = variants.VARIANTS[card.variant or variants.DEFAULT]
    sizes = f" if {kind.peft_size_condition}" if kind.peft_size_condition else ""  # flashbone itself takes all sizes
    if plain and kind.peft_init_weights is not None:
        words.append(f"PEFT 0.14 to 0.18 loads it as it is{sizes}.")
    if plain and kind.miss_init_weights is not None:
        commands.append("flashbone convert . ../miss --to miss")
        words.append(f"Plain PEFT 0.17 and newer loads it after `--to miss`{sizes}.")
    if card.fits_lora and not card.is_rwkv and not card.has_gguf_base:
        exact = kind.is_low_rank
        base = cards.base_word(card)
        commands.append(f"flashbone convert . ../lora --to lora --base {base}" + ("" if exact else " --error 0.01"))
        how = "exactly" if exact else "approximately, to the error that is asked for"
        words.append(f"Any PEFT loads it, {how}, after `--to lora`.")
    if card.fits_rwkv and kind.rwkv_peft_mode is not None:
        commands.append("flashbone convert . ../adapter.pth --to rwkv-peft")
        words.append("RWKV-PEFT reads it after `--to rwkv-peft`.")
    words.append("Merged into its base, as below, it is part of a plain model.")
    return [*words, "`flashbone inspect .` says which serving engines take it."], commands


FORMAT = AdapterFormat("peft", Adapter, read, write, _usage, peft_type="BONE")
