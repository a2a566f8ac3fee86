"""The formats of adapters: how each is recognised, and which files it is."""

from pathlib import Path

from flashbone.errors import FormatError
from flashbone.files import fields, folders, gguf, lora, miss, mlx, peft, pth, rwkv
from flashbone.files.adapter import Adapter
from flashbone.files.formats import AdapterFormat
from flashbone.files.lora import Lora
from flashbone.files.sources import read_json

FORMATS = {f.name: f for f in (peft.FORMAT, miss.FORMAT, lora.FORMAT, rwkv.FORMAT, gguf.FORMAT, mlx.FORMAT)}
_OF_PEFT = {f.peft_type: f for f in FORMATS.values() if f.peft_type}


def recognise(path: Path) -> tuple[AdapterFormat, Path]:
    """The format of an adapter, by the configuration of a folder and by the suffix of a file; and the path that its
    reader takes.

    Raises:
        FormatError: it is of no format that is read.
    """
    if path.is_file() and path.name in (folders.CONFIG, folders.SAFETENSORS, folders.PICKLE):
        path = path.parent
    config = path / folders.CONFIG
    if path.is_dir() and not config.exists():  # what conversion makes of formats of one file
        files = (path / f"adapter{f.suffix}" for f in FORMATS.values() if f.suffix)
        path = next((file for file in files if file.is_file()), path)
    if path.is_file():
        if path.suffix == gguf.FORMAT.suffix:
            raise FormatError(f"{path}: GGUF adapters are only written; convert from the adapter that it was made of")
        return rwkv.FORMAT, path
    if not config.is_file():
        return peft.FORMAT, path  # whose reader refuses it
    content = read_json(config)
    method = content.get("peft_type")
    if "peft_type" not in content and "fine_tune_type" in content:
        raise FormatError(f"{path}: adapters of mlx-lm are only written; convert from the adapter that it was made of")
    if not isinstance(method, str) or method not in _OF_PEFT:
        kind = "it has no peft_type" if method is None else f"this is a {fields.shown(method)} adapter"
        raise FormatError(f"{config}: {kind}, wanted {', '.join(_OF_PEFT)}")
    return _OF_PEFT[method], path


def read(path: Path) -> tuple[AdapterFormat, Adapter | Lora]:
    """Read an adapter of any format.

    Raises:
        FormatError: it is missing, broken, or of no format that is read.
    """
    form, path = recognise(path)
    assert form.read is not None, "what is recognised can be read"
    return form, form.read(path)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter of the family, in any format.

    Raises:
        FormatError: it is missing, broken, or a LoRA.
    """
    form, path = recognise(path)
    if form.holds is Lora:
        raise FormatError(
            f"{path}: this is a {form.name.upper()} adapter, which flashbone does not merge; PEFT does, with"
            " PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()"
        )
    adapter = form.read(path) if form.read else None
    assert isinstance(adapter, Adapter)
    return adapter


def rwkv_kind(path: Path) -> str:
    """What a `.pth` file of RWKV is, by its names: "model" or "adapter"; "" for any other, and for one that cannot be
    read, which readers refuse with the reason."""
    try:
        names = [entry.name for entry in pth.scan(path).entries]
    except FormatError:
        return ""
    return "model" if rwkv.are_of_model(names) else "adapter" if rwkv.are_of_adapter(names) else ""


def files_of(path: Path) -> list[Path]:
    """The files that make an adapter what it is: the tensors, and the configuration of a folder."""
    _, path = recognise(path)
    return [path] if path.is_file() else [path / folders.CONFIG, folders.weights_file(path)]
