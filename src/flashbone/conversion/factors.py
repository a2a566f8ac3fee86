"""Between block adapters and plain LoRAs: exact factors where there are any, else a truncated SVD."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flashbone import variants
from flashbone.errors import ConfigError, FormatError, NonFiniteError, ShapeError, shortened
from flashbone.files import names, tensors
from flashbone.files.adapter import Adapter
from flashbone.files.base import BaseModel
from flashbone.files.folders import in_saved_module
from flashbone.files.lora import Lora
from flashbone.files.placing import PlacedTensor, place
from flashbone.variants import lowrank
from flashbone.variants.lowrank import Factors


@dataclass(frozen=True)
class ModuleError:
    """What the LoRA of one module leaves out.

    Attributes:
        name: of the module.
        rank: that its factors use, before they are padded to the rank of the whole LoRA.
        error: `|delta - B A| / |delta|`, in Frobenius norm, of the factors as they are stored.
    """

    name: str
    rank: int
    error: float


def to_lora(
    adapter: Adapter,
    model: BaseModel,
    rank: int | None,
    error: float | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Lora, tuple[ModuleError, ...]]:
    """The adapter as a LoRA of one rank, and what each module lost by it (nothing where it is exact).

    Args:
        adapter: The adapter.
        model: Its base. Its weights are read, one at a time, where the variant's delta depends on them.
        rank: Of the LoRA. None: that of the largest block, where the variant is a LoRA.
        error: The largest relative error of a module; the LoRA has the smallest rank with which all meet it.
        progress: Called with the modules done and all of them.

    Raises:
        ConfigError: rank and error contradict each other, cannot be met, or one of them is needed.
        FormatError: adapter and base do not belong together, or a LoRA has no place for some of it.
        ShapeError: blocks do not fit the base.
        NonFiniteError: a delta holds NaN or infinity.
    """
    lowrank.check_size(rank, error)
    places = [p for p in place(model, blocks_only(adapter)) if p.block is not None]
    saved, problems = _saved_modules(adapter, model)
    problems += _without_factors(adapter, model, places)
    if problems:
        raise FormatError(f"a plain LoRA has no place for {'; '.join(problems)}; merge the adapter instead")
    of_modules: dict[str, Factors] = {}
    for here in places:
        of_modules[here.name] = _factored(here, adapter.variant, model, rank, error)
        if progress is not None:
            progress(len(of_modules), len(places))
    common = max([rank or 1, *(factors.used for factors in of_modules.values())])
    lora = Lora(
        {name: lowrank.pad(factors.A, factors.B, common) for name, factors in of_modules.items()},
        dict(adapter.replacements),
        adapter.base_model,
        model.config,
        conv1d=frozenset(p.name for p in places if p.transposed) - adapter.transposed,
        embeddings=adapter.transposed,
        target_modules=_endings(places, model),
        modules_to_save=saved,
        task_type=adapter.config.get("task_type"),
    )
    if all(factors.is_exact for factors in of_modules.values()):
        return lora, ()
    errors = [ModuleError(name, factors.used, factors.error) for name, factors in of_modules.items()]
    return lora, tuple(sorted(errors, key=lambda e: (-e.error, e.name)))


def blocks_only(adapter: Adapter) -> Adapter:
    """Without the replacements of tensors that no block shifts: a LoRA needs no place in the base for them."""
    shifted = {adapter.parameter(name) for name in adapter.blocks}
    return replace(adapter, replacements={n: t for n, t in adapter.replacements.items() if n in shifted})


def _factored(
    here: PlacedTensor, variant: variants.Variant, model: BaseModel, rank: int | None, error: float | None
) -> Factors:
    assert here.block is not None, "only places of blocks"

    def weight() -> Tensor:
        stored = model.tensor(here.tensor) if here.replacement is None else here.replacement
        return stored.mT if here.transposed else stored

    try:
        return lowrank.factored(variant, here.block, here.matrix, weight, rank, error)
    except (ConfigError, NonFiniteError) as problem:
        raise type(problem)(f"{here.name}: {problem}") from None


def _without_factors(adapter: Adapter, model: BaseModel, places: Iterable[PlacedTensor]) -> list[str]:
    """The layers that no LoRA adapts, each with the reason."""
    problems = []
    for here in places:
        if here.name in adapter.parameters:
            problems.append(f"{here.name}, a parameter by itself (target_parameters)")
        elif len(here.shape) != 2:
            problems.append(f"{here.name}, a convolution")
        elif f"{here.tensor.removesuffix('.out_proj.weight')}.in_proj_weight" in model.entries:
            problems.append(f"{here.name}, whose weight its attention reads without calling it")
    return problems


def _saved_modules(adapter: Adapter, model: BaseModel) -> tuple[tuple[str, ...], list[str]]:
    """Endings of the names of the modules that the adapter holds whole, and the replacements outside of them.

    The configuration names the modules; a file without one (RWKV-PEFT's) may hold any parameter, and a LoRA can hold
    whole modules alone.
    """
    asked = adapter.config.get("modules_to_save") or ()
    listed = tuple(n for n in asked if any(in_saved_module(parameter, (n,)) for parameter in adapter.replacements))
    stored, _ = names.locate(adapter.replacements, model.entries)
    derived, problems = [], []
    for name in Lora({}, adapter.replacements, modules_to_save=listed).without_place():
        module = stored.get(name, "").rpartition(".")[0]
        if module and all(entry in stored.values() for entry in model.entries if entry.startswith(f"{module}.")):
            derived.append(name.rpartition(".")[0])
        else:
            problems.append(f"{name}, which is neither a bias nor part of a whole module")
    return (*listed, *dict.fromkeys(derived)), problems


def _endings(places: Iterable[PlacedTensor], model: BaseModel) -> tuple[str, ...]:
    """For each module the shortest ending of its name that no other part of the base has."""
    adapted = {p.tensor.rpartition(".")[0]: p.name for p in places}
    others = {part for entry in model.entries for part in _containers(entry)} - set(adapted) - set(adapted.values())
    taken = {ending for name in others for ending in names.dotted_endings(name)}
    ends = {next((e for e in names.dotted_endings(name) if e not in taken), name) for name in adapted.values()}
    return tuple(sorted(ends))


def _containers(entry: str) -> Iterator[str]:
    parts = entry.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def check_finite(lora: Lora, where: Path) -> None:
    """Check that every number of the factors is finite.

    Raises:
        NonFiniteError: some are not; their modules are named.
    """
    broken = [name for name, pair in lora.factors.items() if not all(torch.isfinite(t).all() for t in pair)]
    if broken:
        raise NonFiniteError(f"{where}: the factors of {', '.join(broken)} hold NaN or infinity; the LoRA is broken")


def on_base(lora: Lora, model: BaseModel, where: Path) -> Lora:
    """The LoRA with its base's config, and which layers keep their weight as (in, out).

    Raises:
        FormatError: names are missing from the base, or ambiguous; all are listed.
        ShapeError: factors do not fit their layers; all are listed.
    """
    stored, lost = names.locate((f"{name}.weight" for name in lora.factors), model.entries)
    problems = [f"{name}: {reason}" for name, reason in lost.items()]
    misfits, conv1d = [], set()
    for name, (A, B) in lora.factors.items():
        if (tensor := stored.get(f"{name}.weight")) is None:
            continue
        is_conv1d = name not in lora.embeddings and bool(names.is_transposed(tensor, model.config))
        conv1d |= {name} if is_conv1d else set()
        shape, got = model.entries[tensor].shape, (len(B), A.shape[1])
        if (shape[::-1] if is_conv1d or name in lora.embeddings else shape) != got:
            misfits.append(f"{name}: factors for {got[0]} x {got[1]}, the base has {' x '.join(map(str, shape))}")
    if problems:
        raise FormatError(f"{where}: the LoRA does not fit {model.folder}: {'; '.join(problems + misfits)}")
    if misfits:
        raise ShapeError(f"{where}: the LoRA does not fit {model.folder}: {'; '.join(misfits)}")
    return replace(lora, base_config=model.config, conv1d=frozenset(conv1d))


def without_values_of_base(lora: Lora, model: BaseModel) -> Lora:
    """The LoRA without replacements that are the base's own values, such as the copy of an embedding that PEFT saves
    along when its layer is adapted."""
    tensor_of, _ = names.locate(lora.replacements, model.entries)
    if names.has_tied_embeddings(model.config, model.entries):
        inputs = [tensor for tensor in model.entries if names.is_embedding(tensor, names.INPUT_EMBEDDINGS)]
        heads = [n for n in lora.replacements if n not in tensor_of and names.is_embedding(n, names.OUTPUT_EMBEDDINGS)]
        tensor_of |= dict.fromkeys(heads, inputs[0]) if len(inputs) == 1 else {}
    kept = {}
    for name, value in lora.replacements.items():
        entry = model.entries.get(tensor_of.get(name, ""))
        if entry is not None and entry.shape == tuple(value.shape) and entry.dtype in tensors.FLOATS:
            stored = model.tensor(entry.name)
            wide = torch.promote_types(stored.dtype, value.dtype)
            if torch.equal(stored.to(wide), value.to(wide)):
                continue
        kept[name] = value
    return replace(lora, replacements=kept)


def resized(lora: Lora, rank: int | None, error: float | None, where: Path) -> Lora:
    """The same LoRA with its factors padded with zeros to a rank.

    Raises:
        ConfigError: the rank is below that of the LoRA, or an error is given.
    """
    if rank is None and error is None:
        return lora
    lowrank.check_size(rank, error)
    if rank is None or rank < lora.rank:
        asked = f"error {error}" if rank is None else f"rank {rank}"
        raise ConfigError(
            f"{where}: {asked}: this LoRA has rank {lora.rank}, and may be padded but not cut; ask for a rank of"
            f" {lora.rank} or more, or for none"
        )
    return replace(lora, factors={name: lowrank.pad(A, B, rank) for name, (A, B) in lora.factors.items()})


def to_adapter(lora: Lora, where: Path) -> Adapter:
    """The `bone` adapter that a LoRA is, where every A is stacked identities; padding is taken off again.

    Raises:
        FormatError: some A is free; all such modules are named.
    """
    sizes = {name: _block_size(A, B) for name, (A, B) in lora.factors.items()}
    if free := [name for name, r in sizes.items() if r == 0]:
        raise FormatError(
            f"{where}: a LoRA with a trained A is not a Bone adapter ({shortened(free, 3)}); use it with PEFT as it is,"
            " or merge it"
        )
    # Where r is not below the input features, any larger one is the same function: that of the other modules.
    known = max((r for name, r in sizes.items() if r < lora.factors[name][0].shape[1]), default=lora.rank)
    sizes = {n: r if r < lora.factors[n][0].shape[1] else max(r, min(known, lora.rank)) for n, r in sizes.items()}
    blocks = {name: lora.factors[name][1][:, :r].mT.contiguous() for name, r in sizes.items()}
    r = Counter(sizes.values()).most_common(1)[0][0]
    config = {
        "peft_type": "BONE",
        "variant": "bone",
        "r": r,
        "rank_pattern": {rf"\A{re.escape(name)}": size for name, size in sizes.items() if size != r},
        "bias": lora.bias.replace("lora_only", "bone_only"),
        "target_modules": sorted(lora.target_modules or lora.factors),
        "modules_to_save": list(lora.modules_to_save),
        "task_type": lora.task_type,
        "base_model_name_or_path": lora.base_model,
    }
    return Adapter(variants.get("bone"), blocks, lora.replacements, config, lora.base_model, frozenset(lora.embeddings))


def _block_size(A: Tensor, B: Tensor) -> int:
    """The smallest r for which A is stacked identities, and zeros below them, as in B; 0: none is."""
    repeats, used = (A[0, 1:] == 1).nonzero(), B.count_nonzero(0).nonzero()
    r = int(repeats[0]) + 1 if len(repeats) else max(A.shape[1], int(used[-1]) + 1 if len(used) else 0)
    if r > len(A) or A[r:].any() or B[:, r:].any():
        return 0
    exact = variants.get("bone").factors(A.new_zeros(r, len(B)), len(B), A.shape[1])
    return r if exact is not None and torch.equal(A[:r], exact[0]) else 0
