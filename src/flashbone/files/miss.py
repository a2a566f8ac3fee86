"""Adapter folders of PEFT's MISS (PEFT 0.17 and newer): three members of the family under another prefix.

adapter_config.json: peft_type "MISS", r, init_weights, mini_r, bias, miss_dropout; what `folders.py` says, and

    base_model.model.<module>.miss_block        the block of an adapted linear layer

`init_weights` chooses the variant: true or false (a random start) is bone, "bat" is bat-col, "mini" is mini. There is
one r for all layers, and the layers are linear.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import fields, folders
from flashbone.files.adapter import Adapter, is_same
from flashbone.files.states import read_state

METHOD = folders.Method(
    kind="MISS",
    prefix="miss",
    dropout="miss_dropout",
    checks={
        "r": fields.SIZE,
        "mini_r": fields.SIZE,
        "init_weights": (lambda v: isinstance(v, bool) or v in ("bat", "mini"), "true, false, 'bat' or 'mini'"),
        "miss_dropout": fields.PROBABILITY,
        "bias": (
            lambda v: isinstance(v, str) and (v in ("none", "all") or v.endswith("_only")),
            "'none', 'all' or 'MiSS_only'",
        ),
    },
    defaults={"r": 64, "mini_r": 1, "init_weights": True, "miss_dropout": 0.0, "bias": "none"},
)
_BY_INIT = {"bat": "bat-col", "mini": "mini"}
_BY_VARIANT = {name: init for init, name in _BY_INIT.items()} | {"bone": True}


def variant_name(init_weights: object) -> str | None:
    """The variant that a MISS config's `init_weights` chooses; None for what PEFT does not know."""
    if isinstance(init_weights, bool):
        return "bone"
    return _BY_INIT.get(init_weights) if isinstance(init_weights, str) else None


def read(path: str | Path) -> Adapter:
    """Read an adapter folder whole; tensors are on the CPU, in the file's dtypes.

    Raises:
        FormatError: something is missing, broken or unknown; all bad fields, or all bad keys, are named at once.
    """
    folder = Path(path)
    config = folders.read_config(folder, METHOD)
    file = folders.weights_file(folder)
    return _adapter(file, read_state(file), config)


def _adapter(file: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Adapter:
    """What a file with these keys and this config says."""
    name = variant_name(config["init_weights"])
    assert name is not None, "the config was checked"
    variant = variants.get(name)
    held = folders.sort_keys(state, config, METHOD.block)
    problems = list(held.problems)
    for module, block in held.blocks.items():
        where = f"{module}{METHOD.block}"
        problems += folders.block_problems(where, block, variant, config["r"], config["mini_r"], stacked=False)
    if not held.blocks and not problems:
        problems.append("it holds no miss_block")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    return Adapter(variant, held.blocks, held.replacements, config, config.get("base_model_name_or_path") or None)


def write(adapter: Adapter, folder: Path) -> None:
    """Write a folder that PEFT 0.17 and newer load without flashbone.

    That r divides what it has to in PEFT, and that layers are linear, the tensors tell only in part; PEFT refuses such
    layers itself.

    Raises:
        FormatError: MISS cannot hold this adapter; all reasons are named, and nothing is written.
    """
    config = _config(adapter)
    state = folders.state_of(adapter, METHOD.block)
    file = Path("MISS folder")
    again = _adapter(file, state, folders.checked(file, config, METHOD))
    if not is_same(replace(again, config=adapter.config), adapter):
        raise FormatError("names of this adapter would mean something else in a MISS folder; rename its layers")
    folders.write_folder(folder, config, state)


def _config(adapter: Adapter) -> dict[str, Any]:
    is_own = adapter.config.get("peft_type") == METHOD.kind
    config = (dict(adapter.config) if is_own else {}) | folders.shared_config(adapter, METHOD)
    single = config.pop("parameters_to_save")
    name = adapter.variant.name
    r, others = folders.sizes(adapter)
    others_only = f"MISS has bone, mini and bat-col only; keep it as BONE, or convert it to {_way_out(name)}"
    reasons: dict[str, Any] = {
        others_only: name not in _BY_VARIANT,
        "its layers are linear, embeddings are not": adapter.transposed,
        "it adapts modules, no single parameters": adapter.parameters - adapter.transposed,
        f"it has one r for all layers, here {r}, which some do not have": others,
        "it holds whole modules and biases, no single parameters": single,
        "PEFT's sizes have to be multiples of the block's": _known_misfits(adapter),
    }
    folders.refuse(adapter, reasons, "MISS")
    config |= {"r": r, "mini_r": folders.mini_r(adapter, "MISS")}
    config["init_weights"] = _BY_VARIANT[name]
    if name == "bone" and adapter.config.get("init_weights") is False:
        config["init_weights"] = False
    if config["bias"] not in ("none", "all"):
        config["bias"] = "MiSS_only"
    return config


def _way_out(variant: str) -> str:
    return "rwkv-peft or to a LoRA" if variant == "bat-row" else "a LoRA"


def _known_misfits(adapter: Adapter) -> list[str]:
    """Layers of which a bias says that they have another number of outputs than PEFT's bat and mini allow."""
    found = []
    for name, block in adapter.blocks.items():
        bias = adapter.replacements.get(f"{name}.bias")
        if bias is None or bias.ndim != 1 or adapter.variant.name not in ("bat-col", "mini"):
            continue
        if len(bias) % block.shape[-1]:
            found.append(f"{name} has {len(bias)} outputs, a block {block.shape[-1]}")
    return found
