"""Adapter files of RWKV-PEFT until 2025, when MISS folders came: one `.pth` (or safetensors) with the names of RWKV's
own checkpoints.

    blocks.<i>.att.receptance.disha       the block of a projection; in older files `.bone`
    blocks.<i>.ln1.weight, ln_out.bias    LayerNorms, and of RWKV-6 every time_*: trained values, whole

Neither the mode nor the block size is stored. A block of two axes is (r, out), mode `bone`. One of three axes is
(n, r, r), mode `bat`: RWKV-PEFT counts input shards, so it is bat-row. PEFT's bat (bat-col) counts output shards, and
on a square layer has the same shape; it never comes in such a file but from the first versions of RWKV-PEFT, whose
`.bone` files counted them, too, and are refused where shapes show it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import cards
from flashbone.files.adapter import Adapter
from flashbone.files.blocks import refuse
from flashbone.files.formats import AdapterCard, AdapterFormat
from flashbone.files.names import RWKV_NAME, not_rwkv, rwkv_lead
from flashbone.files.states import read_state, write_pickle

SUFFIXES = (".disha", ".bone")
BY_MODE = variants.by_tool_name("rwkv_peft_mode")
_LEAD = "model."  # of a wrapper, before names in RWKV's own checkpoints


@dataclass(frozen=True)
class RwkvAdapter:
    """The tensors of an adapter file of RWKV-PEFT.

    Attributes:
        suffix: of its keys, "disha" or "bone".
        modes: "bone" (two axes), "bat" (three), or both.
        blocks: projection -> block.
        replacements: parameter -> trained value that takes its place.
    """

    suffix: str
    modes: tuple[str, ...]
    blocks: dict[str, Tensor]
    replacements: dict[str, Tensor]


def are_names(names: Iterable[str]) -> bool:
    """Whether these are names in RWKV's own checkpoints, or a wrapper's of such a model."""
    return all(RWKV_NAME.match(name.removeprefix(_LEAD)) for name in names)


def are_of_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an adapter of RWKV-PEFT."""
    return any(name.endswith(SUFFIXES) for name in names)


def are_of_model(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a whole RWKV model, of whichever version."""
    known = list(names)
    is_whole = "emb.weight" in known and any(name.startswith("blocks.0.") for name in known)
    return is_whole and not are_of_adapter(known)


def read(file: Path) -> RwkvAdapter:
    """Read an adapter file of RWKV-PEFT; tensors are on the CPU, in the file's dtypes.

    Raises:
        FormatError: it is broken, or not an adapter; all unknown keys are named at once.
    """
    return _sorted(file, read_state(file))


def _sorted(file: Path, state: dict[str, Tensor]) -> RwkvAdapter:
    if are_of_model(state):
        raise FormatError(
            f"{file}: is a whole RWKV model, wanted an adapter, whose keys end in {' or '.join(SUFFIXES)}"
        )
    if not are_of_adapter(state):
        like = f", its names are like {next(iter(state))!r}" if state else ""
        raise FormatError(
            f"{file}: no adapter of RWKV-PEFT, none of its {len(state)} tensors ends in {' or '.join(SUFFIXES)}{like}"
        )
    blocks, replacements, problems = {}, {}, []
    for key, tensor in state.items():
        if not are_names([key]):
            problems.append(f"{key}: not a name of an RWKV model")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: got {tensor.dtype}, wanted floating point numbers")
        elif not key.endswith(SUFFIXES):
            replacements[key] = tensor
        elif not _is_block(tensor):
            problems.append(f"{key}: got shape {tuple(tensor.shape)}, wanted (r, out) or (n, r, r)")
        else:
            blocks[key.rpartition(".")[0]] = tensor
    suffixes = sorted({key.rpartition(".")[2] for key in state if key.endswith(SUFFIXES)})
    if len(suffixes) > 1:
        problems.append(f"it mixes keys that end in {' and '.join(suffixes)}")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    by_axes = {variants.dimensions(kind()): mode for mode, kind in BY_MODE.items()}
    modes = tuple(by_axes[n] for n in sorted({block.ndim for block in blocks.values()}))
    return RwkvAdapter(suffixes[0], modes, blocks, replacements)


def _is_block(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and (tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2]))


def read_adapter(file: Path) -> Adapter:
    """Read an adapter file of RWKV-PEFT as RWKV-PEFT does: a block of three axes is bat-row.

    Raises:
        FormatError: it is broken or not an adapter, mixes modes, or counts output shards as RWKV-PEFT did at first.
    """
    return _adapter(file, read(file))


def _adapter(file: Path, raw: RwkvAdapter) -> Adapter:
    mode, *others = raw.modes
    if others:
        raise FormatError(f"{file}: it mixes blocks of the modes {' and '.join(raw.modes)}, and an adapter has one")
    if early := _of_an_early_layout(raw):
        raise FormatError(
            f"{file}: its blocks count output shards, as the first versions of RWKV-PEFT did: {', '.join(early)}; only"
            " (r, out) and (in / r, r, r) are read"
        )
    names = [*raw.blocks, *raw.replacements]
    lead = _LEAD if all(name.startswith(_LEAD) for name in names) else ""
    return Adapter(
        BY_MODE[mode](),
        {name.removeprefix(lead): block for name, block in raw.blocks.items()},
        {name.removeprefix(lead): value for name, value in raw.replacements.items()},
        config={},
    )


def _of_an_early_layout(raw: RwkvAdapter) -> list[str]:
    """Blocks that RWKV-PEFT cannot have written today, by their shapes. It had `.bone` files of (out, r) and of
    (out / r, r, r); and the hidden size between ffn.key and ffn.value is larger than the model's."""
    if raw.modes == ("bone",):
        return [n for n, b in raw.blocks.items() if raw.suffix == "bone" and b.shape[0] > b.shape[1]]
    pairs = [(name, name.removesuffix("key") + "value") for name in raw.blocks if name.endswith("ffn.key")]
    known = [(name, raw.blocks[name], raw.blocks[other]) for name, other in pairs if other in raw.blocks]
    return [name for name, key, value in known if len(key) * key.shape[-1] > len(value) * value.shape[-1]]


def write(adapter: Adapter, file: Path) -> None:
    """Write a file of RWKV-PEFT. Its merge script takes any r in each layer, its training needs one r for all.

    Raises:
        FormatError: the format cannot hold this adapter; all reasons are named, and nothing is written.
    """
    names = [*adapter.blocks, *adapter.replacements]
    lead = rwkv_lead(names)
    modes = " and ".join(f"{kind.name} (its mode {mode})" for mode, kind in BY_MODE.items())
    way_out = "miss or a LoRA" if adapter.variant.miss_init_weights is not None else "a LoRA"
    other_mode = f"RWKV-PEFT has {modes} only; keep it as BONE, or convert it to {way_out}"
    reasons = {
        other_mode: adapter.variant.rwkv_peft_mode is None,
        "it adapts linear layers only": {*adapter.transposed, *adapter.parameters},
        "these are no names of an RWKV model": not_rwkv(names),
    }
    refuse(adapter, reasons, "rwkv-peft")
    assert lead is not None, "other names were refused"
    cut = len(lead)
    state = {f"{name[cut:]}{SUFFIXES[0]}": block for name, block in adapter.blocks.items()}
    state |= {name[cut:]: value for name, value in adapter.replacements.items()}
    again = _adapter(file, _sorted(file, state))
    if {n: id(t) for n, t in again.blocks.items()} != {n[cut:]: id(t) for n, t in adapter.blocks.items()}:
        raise FormatError("names of this adapter would mean something else in a file of RWKV-PEFT; rename its layers")
    write_pickle(state, file)


def _usage(card: AdapterCard) -> str:
    how = "RWKV-PEFT up to 2025 reads the `.pth` file here (`merge/merge_disha.py`); newer versions take MISS folders."
    convert = cards.part("Convert", cards.shell("flashbone convert adapter.pth ../peft --to peft"))
    return cards.part("Load", how) + convert + cards.merging(card, "adapter.pth")


FORMAT = AdapterFormat("rwkv-peft", Adapter, read_adapter, write, _usage, suffix=".pth")
