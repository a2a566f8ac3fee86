"""An adapter in whatever format: how each is recognised, and which files it is."""

from pathlib import Path

from flashbone.errors import FormatError
from flashbone.files import fields, miss, peft, pth, rwkv
from flashbone.files.adapter import Adapter
from flashbone.files.sources import read_json

PEFT_TYPES = {"BONE": "peft", "MISS": "miss", "LORA": "lora"}  # PEFT's peft_type -> name of the format
_READERS = {"peft": peft.read, "miss": miss.read, "rwkv-peft": rwkv.read_adapter}


def recognise(path: Path) -> tuple[str, Path]:
    """Name of the format of what lies there, by the configuration of a folder and by the suffix of a file; and the
    path that its reader takes.

    Raises:
        FormatError: it is of no format that is read.
    """
    if path.is_file() and path.name in (peft.CONFIG, peft.SAFETENSORS, peft.PICKLE):
        path = path.parent
    if path.is_dir() and not (path / peft.CONFIG).exists():  # what conversion makes of formats of one file
        path = next((path / name for name in ("adapter.pth", "adapter.gguf") if (path / name).is_file()), path)
    if path.is_file():
        if path.suffix == ".gguf":
            raise FormatError(f"{path}: GGUF adapters are only written; convert from the adapter that it was made of")
        return "rwkv-peft", path
    kind = read_json(path / peft.CONFIG).get("peft_type") if (path / peft.CONFIG).is_file() else "BONE"
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        raise FormatError(
            f"{path / peft.CONFIG}: this is a {fields.shown(kind)} adapter, wanted {', '.join(PEFT_TYPES)}"
        )
    return PEFT_TYPES[kind], path  # a folder without a config is refused by the reader of BONE


def read_adapter(path: Path) -> Adapter:
    """Read an adapter of the family, in any format.

    Raises:
        FormatError: it is missing, broken, or a LoRA.
    """
    name, path = recognise(path)
    if name not in _READERS:
        raise FormatError(
            f"{path}: this is a {name.upper()} adapter, which flashbone does not merge; PEFT does, with"
            " PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()"
        )
    return _READERS[name](path)


def rwkv_kind(path: Path) -> str:
    """What a `.pth` file of RWKV is, by its names: "model" or "adapter"; "" for any other, and for what cannot be read,
    of which readers say why."""
    try:
        found = [entry.name for entry in pth.scan(path).entries]
    except FormatError:
        return ""
    return "model" if rwkv.are_of_model(found) else "adapter" if rwkv.are_of_adapter(found) else ""


def files_of(path: Path) -> list[Path]:
    """The files that make an adapter what it is: the tensors, and the configuration of a folder."""
    _, path = recognise(path)
    return [path] if path.is_file() else [path / peft.CONFIG, peft.weights_file(path)]
