"""An adapter file read for a report: its tensors by module, and how method and variant were told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import miss, peft, reading, rwkv
from flashbone.files.adapter import Adapter
from flashbone.files.sources import read_json
from flashbone.files.states import read_state

# LoRA's tensors, with the axis of each that is as long as the rank; a DoRA has the last one, too.
LORA_RANK_AXES = {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1}
DORA = ".lora_magnitude_vector"
# As transformers names a model's files.
_MODEL_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")


@dataclass(frozen=True)
class AdapterContents:
    """The tensors of an adapter, sorted; `layout` to `base_model` as in `AdapterReport`.

    Attributes:
        file: that holds the tensors.
        variant: with its settings; None if the file leaves it open.
        blocks: module -> ending of the key -> tensor.
        sizes: module -> block size or rank.
        others: name in the base -> tensor that replaces it.
        not_plain: why no plain LoRA could hold it, as far as the file tells; empty if one could.
    """

    file: Path
    layout: str
    method: str
    evidence: str
    base_model: str | None
    variant: variants.Variant | None
    blocks: dict[str, dict[str, Tensor]]
    sizes: dict[str, int]
    others: dict[str, Tensor]
    not_plain: str = ""


def read_contents(path: Path) -> AdapterContents:
    """Read an adapter: a folder of PEFT, or a file of RWKV-PEFT.

    Raises:
        FormatError: it is missing, broken, or of no known layout.
    """
    if path.is_file() and _MODEL_WEIGHTS.fullmatch(path.name) and (path.parent / "config.json").is_file():
        raise FormatError(f"{path}: holds a model's weights; for the model, give its folder, {path.parent}")
    form, path = reading.recognise(path)
    return _READERS[form.name](path)


def _read_bone(folder: Path) -> AdapterContents:
    adapter = peft.read(folder)
    named = adapter.config.get("variant")
    layout = "PEFT folder, as flashbone writes it" if named else "PEFT folder, as PEFT 0.14 to 0.18 wrote it"
    evidence = f"variant {named!r}" if named else f"no variant, init_weights {adapter.config['init_weights']!r}"
    return _of_folder(folder, adapter, layout, evidence, peft.BLOCK)


def _read_miss(folder: Path) -> AdapterContents:
    adapter = miss.read(folder)
    evidence = f"peft_type 'MISS', init_weights {adapter.config['init_weights']!r}"
    return _of_folder(folder, adapter, "PEFT folder", evidence, miss.BLOCK)


def _of_folder(folder: Path, adapter: Adapter, layout: str, evidence: str, ending: str) -> AdapterContents:
    is_other = adapter.transposed or adapter.parameters
    return AdapterContents(
        file=peft.weights_file(folder),
        layout=layout,
        method=adapter.config["peft_type"],
        evidence=f"{peft.CONFIG}: {evidence}",
        base_model=adapter.base_model,
        variant=adapter.variant,
        blocks={
            name: {peft.BLOCK_OF_TRANSPOSED if name in adapter.transposed else ending: block}
            for name, block in adapter.blocks.items()
        },
        sizes={name: block.shape[-2] for name, block in adapter.blocks.items()},
        others=adapter.replacements,
        not_plain="it adapts embeddings or experts, not only linear layers" if is_other else "",
    )


def _read_lora(folder: Path) -> AdapterContents:
    """Described as it is, also a DoRA and others that `files.lora` refuses; not checked."""
    file = peft.weights_file(folder)
    blocks: dict[str, dict[str, Tensor]] = {}
    others, ranks = {}, {}
    for key, tensor in read_state(file).items():
        name = key.removeprefix(peft.ROOT)
        ending = next((e for e in (*LORA_RANK_AXES, DORA) if name.endswith(e)), None)
        if ending is None:
            others[name] = tensor
            continue
        module = name.removesuffix(ending)
        blocks.setdefault(module, {})[ending] = tensor
        if ending != DORA and tensor.ndim > 1:
            ranks[module] = tensor.shape[LORA_RANK_AXES[ending]]
    without_matrix = [module for module in blocks if module not in ranks]
    if not blocks or without_matrix:
        problem = f"{', '.join(without_matrix)} have no matrix" if blocks else "no tensor is one of that method"
        raise FormatError(f"{file}: {peft.CONFIG} sets peft_type LORA, but {problem}; is the file whole?")
    return AdapterContents(
        file=file,
        layout="PEFT folder",
        method="LORA",
        evidence=f"{peft.CONFIG}: peft_type 'LORA'",
        base_model=read_json(folder / peft.CONFIG).get("base_model_name_or_path") or None,
        variant=None,
        blocks=blocks,
        sizes=ranks,
        others=others,
        not_plain="it is a DoRA, not a plain LoRA" if any(DORA in parts for parts in blocks.values()) else "",
    )


def _read_rwkv(file: Path) -> AdapterContents:
    adapter = rwkv.read(file)
    is_mixed = len(adapter.modes) > 1
    is_told = not is_mixed and (adapter.modes[0] == "bone" or adapter.suffix == "disha")  # see the evidence
    return AdapterContents(
        file=file,
        layout=f"RWKV-PEFT, keys end in .{adapter.suffix}",
        method="BONE",
        evidence="; ".join(_rwkv_evidence(m, adapter.suffix) for m in adapter.modes) + "; both in one file" * is_mixed,
        base_model=None,
        variant=rwkv.BY_MODE[adapter.modes[0]]() if is_told else None,
        blocks={module: {f".{adapter.suffix}": block} for module, block in adapter.blocks.items()},
        sizes={m: b.shape[0] if b.ndim == 2 else b.shape[-1] for m, b in adapter.blocks.items()},
        others=adapter.replacements,
    )


def _rwkv_evidence(mode: str, suffix: str) -> str:
    if mode == "bone":
        return "blocks of two axes (r, out): RWKV-PEFT's mode bone"
    if suffix == "disha":
        return "blocks of three axes (n, r, r) under .disha: RWKV-PEFT's mode bat, n = in / r"
    return (
        "blocks of three axes (n, r, r) under .bone: one of two bats, and the file does not tell them apart."
        " RWKV-PEFT's mode bat is bat-row, with n = in / r; its first versions wrote n = out / r. Where in = out the"
        " shapes are the same"
    )


_READERS = {"peft": _read_bone, "miss": _read_miss, "lora": _read_lora, "rwkv-peft": _read_rwkv}
