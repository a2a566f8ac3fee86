"""Adapter folders of BONE, as PEFT 0.14 to 0.18 wrote it and as flashbone writes it. Nothing of PEFT is imported.

adapter_config.json: peft_type "BONE", r, variant (ours) or init_weights (PEFT's own), rank_pattern, bias, ...; what
`folders.py` says, and

    base_model.model.<name>.bone_block          the block of an adapted module, or parameter (target_parameters)
    base_model.model.<name>.bone_transposed     the same where the weight is stored as (in, out): embeddings
    base_model.model.<parameter>                also a single parameter that is listed in parameters_to_save
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import fields, folders
from flashbone.files.adapter import Adapter, is_same
from flashbone.files.folders import CONFIG, PICKLE, ROOT, SAFETENSORS, weights_file
from flashbone.files.states import read_state
from flashbone.variants.orthogonal import DEFAULT_EPS, MAX_EPS, Orthogonal

__all__ = ["BLOCK", "BLOCK_OF_TRANSPOSED", "CONFIG", "PICKLE", "ROOT", "SAFETENSORS", "read", "weights_file", "write"]

METHOD = folders.Method(
    kind="BONE",
    prefix="bone",
    dropout="dropout",
    checks={
        "r": fields.SIZE,
        "bottleneck_size": (lambda v: v is None or fields.is_size(v), "a positive integer or null"),
        "mini_r": fields.SIZE,
        "use_orthogonal": fields.FLAG,
        "orthogonal_eps": (lambda v: isinstance(v, float) and 0 < v <= MAX_EPS, f"a number in (0, {MAX_EPS}]"),
        "dropout": fields.PROBABILITY,
        "bias": (lambda v: v in ("none", "all", "bone_only"), "'none', 'all' or 'bone_only'"),
        "target_parameters": fields.NAMES,
        "parameters_to_save": fields.NAMES,
        "rank_pattern": (
            lambda v: isinstance(v, dict) and all(fields.is_pattern(k) and fields.is_size(n) for k, n in v.items()),
            "regular expressions with positive integers",
        ),
        "init_weights": (lambda v: isinstance(v, bool) or v == "bat", "true, false or 'bat'"),
        "variant": (lambda v: v is None or isinstance(v, str), "a name"),
    },
    defaults={
        "r": 64,
        "init_weights": True,
        "mini_r": 1,
        "use_orthogonal": True,
        "orthogonal_eps": DEFAULT_EPS,
        "dropout": 0.0,
        "bias": "none",
        "target_parameters": [],
        "parameters_to_save": [],
        "rank_pattern": {},
    },
)
BLOCK, BLOCK_OF_TRANSPOSED = METHOD.block, ".bone_transposed"


def read(path: str | Path) -> Adapter:
    """Read an adapter folder whole; tensors are on the CPU, in the file's dtypes.

    Raises:
        FormatError: something is missing, broken or unknown; all bad fields, or all bad keys, are named at once.
    """
    folder = Path(path)
    config = folders.read_config(folder, METHOD)
    _read_bottleneck(folder / CONFIG, config)
    variant = _variant(folder / CONFIG, config)
    file = weights_file(folder)
    return _adapter(file, read_state(file), config, variant)


def _adapter(file: Path, state: dict[str, Tensor], config: dict[str, Any], variant: variants.Variant) -> Adapter:
    """What a file with these keys and this config says."""
    held = folders.sort_keys(state, config, BLOCK, BLOCK_OF_TRANSPOSED)
    parameters = frozenset(name for name in held.blocks if fields.is_targeted(name, config["target_parameters"]))
    problems = list(held.problems)
    for name, block in held.blocks.items():
        r = fields.size_for(name, config["rank_pattern"], config["r"])
        where = f"{name}{BLOCK}"
        problems += folders.block_problems(where, block, variant, r, config["mini_r"], name in parameters)
    if not held.blocks and not problems:
        problems.append("it holds no bone_block")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    base = config.get("base_model_name_or_path") or None
    return Adapter(variant, held.blocks, held.replacements, config, base, held.transposed, parameters)


def _read_bottleneck(file: Path, config: dict[str, Any]) -> None:
    """`bottleneck_size` is the orthogonal variant's spelling of r."""
    size = config.get("bottleneck_size")
    if size is not None and config["r"] == METHOD.defaults["r"]:
        config["r"] = size
    if size not in (None, config["r"]):
        raise FormatError(f"{file}: bottleneck_size: got {size!r}, wanted r, which is {config['r']!r}")


def _variant(file: Path, config: dict[str, Any]) -> variants.Variant:
    """Named by `variant`; PEFT 0.14 to 0.18 have no such field and mean bat-col by `init_weights="bat"`, else bone.
    As in a BoneConfig, a `bottleneck_size` means orthogonal."""
    name, is_bat = config.get("variant") or "bone", config["init_weights"] == "bat"
    if is_bat and name == "bone":
        name = "bat-col"
    elif config.get("bottleneck_size") is not None and name == "bone":
        name = Orthogonal.name
    if name not in variants.VARIANTS:
        known = ", ".join(map(repr, variants.VARIANTS))
        raise FormatError(f"{file}: variant: got {name!r}, wanted one of {known}; was it written by a newer flashbone?")
    if is_bat and name != "bat-col":
        raise FormatError(f"{file}: init_weights 'bat' means the variant 'bat-col', but variant is {name!r}")
    if name != Orthogonal.name:
        return variants.get(name)
    return variants.get(name, use_orthogonal=config["use_orthogonal"], eps=config["orthogonal_eps"])


def write(adapter: Adapter, folder: Path) -> None:
    """Write the folder of a BONE adapter, such that `read` gives the adapter back, and PEFT's BONE loads it.

    Raises:
        FormatError: the adapter has something for which BONE has no name; nothing is written.
    """
    config, state = _config(adapter), folders.state_of(adapter, BLOCK, BLOCK_OF_TRANSPOSED)
    file = Path("BONE folder")
    again = _adapter(file, state, folders.checked(file, config, METHOD), adapter.variant)
    if not is_same(replace(again, config=adapter.config), adapter):
        raise FormatError("names of this adapter would mean something else in a BONE folder; rename its layers")
    folders.write_folder(folder, config, state)


def _config(adapter: Adapter) -> dict[str, Any]:
    is_own = adapter.config.get("peft_type") == METHOD.kind
    config = dict(adapter.config) if is_own else {}
    config |= folders.shared_config(adapter, METHOD)
    pattern, r = config.get("rank_pattern", {}), config.get("r")
    sizes = {name: block.shape[-2] for name, block in adapter.blocks.items()}
    if not is_own or any(fields.size_for(name, pattern, r or 0) != size for name, size in sizes.items()):
        r, others = folders.sizes(adapter)
        pattern = {f"^{re.escape(name)}": size for name, size in others.items()}  # means these blocks alone
    config |= {
        "r": r,
        "rank_pattern": pattern,
        "variant": adapter.variant.name,
        "mini_r": folders.mini_r(adapter, "BONE"),
    }
    starts = adapter.config.get("init_weights") is not False  # at zero
    config["init_weights"] = "bat" if adapter.variant.name == "bat-col" else starts
    meant = config.get("target_parameters") or []
    if any(fields.is_targeted(name, meant) != (name in adapter.parameters) for name in sizes):
        meant = sorted(adapter.parameters)
    config["target_parameters"] = meant or None
    if isinstance(adapter.variant, Orthogonal):
        config |= {"use_orthogonal": adapter.variant.use_orthogonal, "orthogonal_eps": adapter.variant.eps}
    if config.get("bottleneck_size") not in (None, r) or not isinstance(adapter.variant, Orthogonal):
        config.pop("bottleneck_size", None)
    config["parameters_to_save"] = config["parameters_to_save"] or None
    return config
