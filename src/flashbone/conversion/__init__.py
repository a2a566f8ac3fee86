"""Adapters from one format into another: read into an `Adapter` or a `Lora`, check, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from flashbone.conversion import engines, factors, formats
from flashbone.conversion.factors import ModuleError
from flashbone.errors import ConfigError, FormatError
from flashbone.files import outputs
from flashbone.files.adapter import Adapter
from flashbone.files.base import BaseModel, open_base
from flashbone.files.lora import Lora
from flashbone.files.sources import is_hub_id


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        out: the new file or folder.
        source: format of what was read.
        format: format of what was written.
        variant: of the adapter; "lora" if it was read as a LoRA and stays one.
        modules: adapted layers.
        replaced: tensors that take the place of the base's (biases, modules to save).
        exact: whether the result is the same function of the same base, up to rounding in its use.
        rank: of a LoRA.
        errors: for each module what a LoRA of that rank leaves out, the worst first; empty where it is exact.
        files: what was written, relative to `out`; its name alone if it is a file.
        serve: how the engine that was asked for takes it, as a shell command.
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
    """Write an adapter in another format; what cannot be expressed there is refused.

    Args:
        adapter: PEFT folder (BONE, MISS or LORA), or a file of RWKV-PEFT.
        out: A new file or folder, which appears whole or not at all. Formats of one file (rwkv-peft, gguf) become a
            file where `out` ends like one (.pth, .gguf), else a folder that holds it.
        to: "peft", "miss", "lora", "rwkv-peft" or "gguf". None: what `engine` wants.
        engine: "vllm", "llama.cpp", "ollama", "sglang" or "tgi": check its limits, pad the rank to one that it takes,
            and write what it wants to find.
        base: Folder of the base model, or an RWKV model's `.pth`, whose sizes a LoRA needs, and whose weights where the
            variant's delta depends on them. None: the one that the adapter names.
        rank: Of the LoRA. None: the adapter's own where that is exact, else `error` has to be given.
        error: Largest relative error, in Frobenius norm, that the LoRA of a module may have.
        progress: Called with the modules done and all of them.

    Raises:
        FormatError: adapter or base are broken, do not belong together, or cannot be expressed in the format.
        ShapeError: blocks do not fit the base.
        ConfigError: arguments contradict each other.
        FlashboneError: `out` exists, or the disk is full.
    """
    path, out = Path(adapter), Path(out)
    server = engines.get(engine) if engine is not None else None
    target = _target(to, server)
    if target.holds is not Lora and (rank, error) != (None, None):
        raise ConfigError(f"rank and error are those of a LoRA, but {target.name} is none; leave them out")
    source, held = formats.read(path)
    variant = held.variant.name if isinstance(held, Adapter) else "lora"
    errors: tuple[ModuleError, ...] = ()
    if target.holds is Lora:
        model = _base(base, held.base_model)
        if isinstance(held, Adapter):
            if model is None:
                raise FormatError(
                    f"{path}: a LoRA needs the sizes of the base's layers; give the base model's folder, or an RWKV"
                    " model's .pth file"
                )
            held, errors = factors.to_lora(held, model, rank, error, progress)
        else:
            factors.check_finite(held, path)
            held = factors.resized(held, rank, error, path)
            held = held if model is None else factors.on_base(held, model, path)
        if model is not None:
            held = dataclasses.replace(held, base_model=_name_of_base(base, held.base_model))
            if server is not None or target.name == "gguf":
                held = factors.without_values_of_base(held, model)
    elif isinstance(held, Lora):
        held = factors.to_adapter(held, path)
    if server is not None:
        assert isinstance(held, Lora), "engines take LoRAs"
        held = server.prepare(held, path)
    is_file = target.suffix is not None and out.suffix == target.suffix
    outputs.check(out, formats.size(held), path, is_file)
    with outputs.whole_or_absent(out, is_file) as place:
        files = formats.write(target, held, place, is_file)
        if server is not None and isinstance(held, Lora) and not is_file:
            files += server.write_extras(held, place, out)
    return ConversionReport(
        out=out,
        source=source.name,
        format=target.name,
        variant=variant,
        modules=len(held.factors if isinstance(held, Lora) else held.blocks),
        replaced=len(held.replacements),
        exact=not errors,
        rank=held.rank if isinstance(held, Lora) else None,
        errors=errors,
        files=(out.name,) if is_file else tuple(sorted(files)),
        serve=server.command(held, out) if server is not None and isinstance(held, Lora) else None,
    )


def _target(to: str | None, server: engines.Engine | None) -> formats.Format:
    """The format that was asked for, or that the engine wants."""
    if to is None and server is None:
        raise ConfigError(f"to: nothing was given, wanted one of {', '.join(formats.FORMATS)}, or an engine")
    if server is not None and to not in (None, *server.formats):
        raise ConfigError(f"{server.name} takes {' or '.join(server.formats)}, not {to}; leave out one of the two")
    return formats.get(server.formats[0] if to is None else to)  # pyright: ignore[reportOptionalMemberAccess]


def _base(given: str | Path | None, named: str | None) -> BaseModel | None:
    """The base model that was given, else the folder or `.pth` file that the adapter names, if it is here."""
    if given is not None:
        return open_base(Path(given))
    if not named:
        return None
    path = Path(named)
    return open_base(path) if path.is_dir() or (path.suffix == ".pth" and path.is_file()) else None


def _name_of_base(given: str | Path | None, named: str | None) -> str | None:
    """What the LoRA calls its base: the folder that was given, unless the adapter names a model on the hub."""
    is_on_hub = named is not None and "/" in named and is_hub_id(named) and not Path(named).exists()
    return named if given is None or is_on_hub else str(given)
