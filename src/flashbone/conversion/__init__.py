"""Adapters from one format into another: read into an `Adapter` or a `Lora`, check, write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone.conversion import engines, factors
from flashbone.conversion.factors import ModuleError
from flashbone.errors import ConfigError, FormatError, shortened
from flashbone.files import cards, miss, outputs, placing, reading
from flashbone.files.adapter import Adapter
from flashbone.files.base import BaseModel, open_base
from flashbone.files.beside import Beside, beside
from flashbone.files.formats import AdapterCard, AdapterFormat
from flashbone.files.lora import Lora
from flashbone.files.names import rwkv_lead
from flashbone.files.sources import is_hub_id, read_json


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        out: the new file or folder.
        source: format of the adapter.
        format: format of `out`.
        variant: of the adapter; "lora" if it was read as a LoRA.
        modules: adapted layers.
        replaced: tensors that take the place of the base's (biases, modules to save).
        exact: whether the result is the same function of the same base, up to rounding in its use.
        rank: of a LoRA.
        errors: for each module what a LoRA of that rank leaves out, the worst first; empty where it is exact.
        files: names of the files in `out`; its own name if it is a file.
        serve: the shell command that starts the engine with it.
        beside: what else of the adapter's folder was copied for the engine: its tokenizer, template, settings.
    """

    out: Path
    source: str
    format: str
    variant: str
    modules: int
    replaced: int
    exact: bool
    rank: int | None
    errors: tuple[ModuleError, ...]
    files: tuple[str, ...]
    serve: str | None
    beside: str = ""


def convert(
    adapter: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    engine: str | None = None,
    base: str | Path | None = None,
    rank: int | None = None,
    error: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write an adapter in another format; what that format cannot hold is refused.

    Args:
        adapter: PEFT folder (BONE, MISS or LORA), or a file of RWKV-PEFT.
        out: A new file or folder, which appears whole or not at all. Formats of one file (rwkv-peft, gguf) become a
            file where `out` ends like one (.pth, .gguf), else a folder that holds it.
        to: "peft", "miss", "lora", "rwkv-peft", "gguf" or "mlx". None: what `engine` wants.
        engine: A serving engine, of `engines.ENGINES`, such as "vllm" or "llama.cpp": check its limits, pad the rank
            to one that it takes, and write the other files that it needs.
        base: Folder of the base model, or an RWKV model's `.pth`. A LoRA needs its sizes, and its weights where the
            variant's delta depends on them. None: the base that the adapter names.
        rank: Of the LoRA. None: the adapter's r where that is exact, else `error` is needed.
        error: Largest relative error, in Frobenius norm, that the LoRA of a module may have.
        progress: Called with the modules done and all of them.

    Raises:
        FormatError: adapter or base are broken, do not belong together, or do not fit the format.
        ShapeError: blocks do not fit the base.
        ConfigError: arguments contradict each other.
        FlashboneError: `out` exists, or the disk is full.
    """
    path, out = Path(adapter), Path(out)
    server = None if engine is None else engines.get(engine)
    target = _target(to, server)
    if target.holds is not Lora and (rank, error) != (None, None):
        raise ConfigError(f"rank and error are for LoRAs, and {target.name} is not one; omit them")
    source, read = reading.read(path)
    errors: tuple[ModuleError, ...] = ()
    if target.holds is Lora:
        adapted, errors = _to_lora(read, path, base, rank, error, progress, for_server=target.read is None or server)
        adapted = adapted if server is None else server.prepare(adapted, path)
    else:
        adapted = factors.to_adapter(read, path) if isinstance(read, Lora) else read
        if target is miss.FORMAT and (model := _base(base, read.base_model)) is not None:
            _check_inputs(adapted, model, path)
    brought = beside([path] if server is not None else [])
    is_file = bool(target.suffix) and out.suffix == target.suffix
    outputs.check(out, _size(adapted), path, is_file)
    with outputs.whole_or_absent(out, is_file) as place:
        target.write(adapted, place / f"adapter{target.suffix}" if target.suffix and not is_file else place)
        if not is_file:
            cards.put(card_of(target, adapted), place / "README.md")
            if server is not None and isinstance(adapted, Lora):
                brought.copy_to(place)
                server.write_extras(adapted, place, out)
        files = [] if is_file else [file.name for file in place.iterdir()]
    return ConversionReport(
        out=out,
        source=source.name,
        format=target.name,
        variant=read.variant.name if isinstance(read, Adapter) else "lora",
        modules=len(adapted.factors if isinstance(adapted, Lora) else adapted.blocks),
        replaced=len(adapted.replacements),
        exact=not errors,
        rank=adapted.rank if isinstance(adapted, Lora) else None,
        errors=errors,
        files=tuple(sorted(files)) or (out.name,),
        serve=server.command(adapted, out) if server is not None and isinstance(adapted, Lora) else None,
        beside=_beside(adapted, server, brought) if server is not None and not is_file else "",
    )


def _beside(adapted: Adapter | Lora, server: engines.ServingEngine, brought: Beside) -> str:
    """What came along, and what the engine needs besides, for one line."""
    needs = server.needs(adapted) if isinstance(adapted, Lora) else ""
    return (brought.words + server.unread(brought) + needs).removeprefix("; ")


def _target(to: str | None, server: engines.ServingEngine | None) -> AdapterFormat:
    """The format that was asked for, or that the engine wants."""
    if to is None and server is None:
        raise ConfigError(f"to: got nothing, wanted one of {', '.join(reading.FORMATS)}, or an engine")
    if server is not None and to not in (None, *server.formats):
        raise ConfigError(f"{server.name} takes {' or '.join(server.formats)}, not {to}; leave out --to")
    name = server.formats[0] if server is not None and to is None else to
    if name not in reading.FORMATS:
        raise ConfigError(f"to: got {name!r}, wanted one of {', '.join(reading.FORMATS)}")
    return reading.FORMATS[name]


def _to_lora(
    read: Adapter | Lora,
    path: Path,
    base: str | Path | None,
    rank: int | None,
    error: float | None,
    progress: Callable[[int, int], None] | None,
    for_server: object,
) -> tuple[Lora, tuple[ModuleError, ...]]:
    """The LoRA of what was read, and what each module lost by it; `for_server`: without the base's own values."""
    model = _base(base, read.base_model)
    errors: tuple[ModuleError, ...] = ()
    if isinstance(read, Lora):
        factors.check_finite(read, path)
        lora = factors.resized(read, rank, error, path)
        lora = lora if model is None else factors.on_base(lora, model, path)
    elif model is not None:
        lora, errors = factors.to_lora(read, model, rank, error, progress)
    else:
        raise FormatError(
            f"{path}: a LoRA needs the sizes of the base's layers; give the base model's folder, or an RWKV model's"
            " .pth file"
        )
    if model is not None:
        lora = dataclasses.replace(lora, base_model=_name_of_base(base, read.base_model))
        lora = factors.without_values_of_base(lora, model) if for_server else lora
    return lora, errors


def _base(asked: str | Path | None, named: str | None) -> BaseModel | None:
    """The base model that was asked for, else the folder or `.pth` file that the adapter names, if it exists."""
    if asked is not None:
        return open_base(Path(asked))
    if not named:
        return None
    path = Path(named)
    return open_base(path) if path.is_dir() or (path.suffix == ".pth" and path.is_file()) else None


def _check_inputs(adapter: Adapter, model: BaseModel, path: Path) -> None:
    """Refuse layers with fewer inputs than r, which PEFT's MISS takes up to 0.20 alone; all are named."""
    here = [p for p in placing.place(model, factors.blocks_only(adapter)) if p.block is not None]
    small = {p.name: p.matrix[1] for p in here if p.block is not None and p.block.shape[-2] > p.matrix[1]}
    if small:
        named = shortened([f"{name} ({inputs})" for name, inputs in small.items()], 3)
        raise FormatError(
            f"{path}: MISS has an r of at most a layer's inputs in PEFT from 0.21 on, which these layers have not:"
            f" {named}; keep it as BONE, or convert it to a LoRA"
        )


def _name_of_base(asked: str | Path | None, named: str | None) -> str | None:
    """What the LoRA calls its base: the folder that was asked for, unless the adapter names a model on the hub."""
    is_on_hub = named is not None and "/" in named and is_hub_id(named) and not Path(named).exists()
    return named if asked is None or is_on_hub else str(asked)


def _size(adapted: Adapter | Lora) -> int:
    """Bytes of all tensors."""
    factors = [t for pair in adapted.factors.values() for t in pair] if isinstance(adapted, Lora) else []
    blocks = adapted.blocks.values() if isinstance(adapted, Adapter) else []
    return sum(t.nbytes for t in (*factors, *blocks, *adapted.replacements.values()))


def card_of(form: AdapterFormat, adapted: Adapter | Lora) -> AdapterCard:
    """The card of an adapter in a format."""
    if isinstance(adapted, Lora):
        return AdapterCard(
            form,
            None,
            (adapted.rank,),
            tuple(adapted.factors),
            adapted.base_model,
            linear_only=not adapted.embeddings and not adapted.replacements,
            is_rwkv=rwkv_lead([*adapted.factors, *adapted.replacements]) == "",
            task_type=adapted.task_type,
            architecture=_architecture(adapted.base_config, adapted.base_model),
            labels=_labels(adapted.replacements),
        )
    is_plain = not adapted.parameters and not adapted.config.get("parameters_to_save")
    lead = rwkv_lead([*adapted.blocks, *adapted.replacements])
    return AdapterCard(
        form,
        adapted.variant.name,
        tuple(sorted({block.shape[-2] for block in adapted.blocks.values()})),
        tuple(adapted.blocks),
        adapted.base_model,
        linear_only=is_plain and not adapted.transposed,
        fits_lora=is_plain,
        fits_rwkv=not adapted.transposed and not adapted.parameters and lead is not None,
        is_rwkv=lead == "",
        task_type=adapted.config.get("task_type"),
        architecture=_architecture(adapted.config.get("auto_mapping") or {}, adapted.base_model),
        labels=_labels(adapted.replacements),
    )


def _architecture(named: Mapping[str, Any], base: str | None) -> str | None:
    """The base's class: as the adapter's config names it, or the config of a base that is here."""
    file = Path(base, "config.json") if base else None
    if not (found := named.get("base_model_class") or named.get("architectures")) and file is not None:
        found = read_json(file).get("architectures") if file.is_file() else None
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, str) else None


def _labels(replacements: Mapping[str, Tensor]) -> int | None:
    """How many classes a trained head tells apart."""
    last = re.compile(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$")
    heads = (tensor for name, tensor in replacements.items() if last.search(name))
    return next((len(head) for head in heads if head.ndim == 2), None)
