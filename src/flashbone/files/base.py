"""A base model: a folder with config.json and safetensors, in one file or in shards; or an RWKV model's `.pth` file."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files import folders, pth, rwkv, tensors
from flashbone.files.sources import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Suffixes of weights: copies of the unmerged model in another format, and pickles of a training run.
_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl"),
    *(".h5", ".h5.index.json", ".msgpack", ".msgpack.index.json", ".gguf", ".ggml", ".ot", ".npz", ".tflite"),
    *(".mlmodel", ".onnx", ".onnx_data", ".onnx.data"),
)
_RESAVE = (
    "load it with transformers and save_pretrained() it to a new folder, which writes safetensors, then merge into that"
)


@dataclass(frozen=True)
class BaseModel:
    """A checked base model; only headers have been read.

    Attributes:
        folder: its folder, or the `.pth` file itself.
        files: the files that hold its tensors.
        entries: tensor name -> its place, dtype and shape.
        config: config.json; empty where the folder has none.
        companions: paths of the other files that a copy needs, relative to the folder.
    """

    folder: Path
    files: tuple[tensors.TensorFile, ...]
    entries: dict[str, tensors.TensorEntry] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    companions: tuple[Path, ...] = field(repr=False)

    @property
    def is_pth(self) -> bool:
        """Whether it is the `.pth` file of an RWKV model."""
        return self.folder.is_file()

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, read from its file."""
        entry = self.entries[name]
        path = next(file.path for file in self.files if entry in file.entries)
        with path.open("rb") as stream:
            stream.seek(entry.start)
            return tensors.read(stream, entry)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files) + sum((self.folder / c).stat().st_size for c in self.companions)


def open_base(folder: Path) -> BaseModel:
    """Find and check the files of a base model: its folder, or an RWKV model's `.pth` file.

    Raises:
        FormatError: it is missing, incomplete, quantised, or in another format.
    """
    if folder.is_file() and folder.suffix == ".pth":
        return _open_rwkv(folder)
    if folder.is_file() or folder.suffix == ".gguf":
        raise FormatError(f"{folder}: {_why_not_a_folder(folder)}")
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such base model folder")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    _refuse_quantised(folder, config)
    single = (folder / SINGLE).is_file()
    weight_map = {} if single else _weight_map(folder)
    names = [SINGLE] if single else sorted(set(weight_map.values()))
    files = tuple(tensors.scan(folder / name) for name in names)
    entries = _entries(files)
    holder = {entry.name: file.path.name for file in files for entry in file.entries}
    if wrong := [tensor for tensor, name in weight_map.items() if holder.get(tensor) != name]:
        raise FormatError(f"{folder / INDEX}: these tensors are not in the shards that it names: {', '.join(wrong)}")
    return BaseModel(folder, files, entries, config, tuple(_companions(folder, single)))


def _open_rwkv(path: Path) -> BaseModel:
    file = pth.scan(path)
    entries = {entry.name: entry for entry in file.entries}
    if rwkv.are_of_adapter(entries):
        raise FormatError(f"{path}: is an adapter of RWKV-PEFT, wanted the model here; the order is BASE ADAPTER OUT")
    missing = [start for start in ("emb.", "blocks.0.att.") if not any(name.startswith(start) for name in entries)]
    if missing:
        like = f", its names are like {next(iter(entries))}" if entries else ""
        absent = " and no ".join(f"{start}*" for start in missing)
        raise FormatError(f"{path}: is no RWKV model, it has no {absent}{like}; of other models, {_RESAVE}")
    return BaseModel(path, (file,), entries, {}, ())


def _entries(files: tuple[tensors.TensorFile, ...]) -> dict[str, tensors.TensorEntry]:
    entries: dict[str, tensors.TensorEntry] = {}
    for file in files:
        for entry in file.entries:
            if entry.name in entries:
                raise FormatError(f"{file.path}: tensor {entry.name} is in another shard as well; the base is damaged")
            entries[entry.name] = entry
    return entries


def _why_not_a_folder(path: Path) -> str:
    if path.suffix == ".gguf":
        return (
            "is a GGUF file, which is quantised or lays its weights out in its own way; merge into the original"
            " safetensors folder, then convert the result with llama.cpp's convert_hf_to_gguf.py"
        )
    return f"is a file; wanted the folder that holds {SINGLE} or {INDEX}, or the .pth file of an RWKV model"


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise FormatError(
            f"{folder}: the base is quantised ({method}), and merging would round it again; merge into the original"
            " unquantised model, then quantise the result"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> shard, from the index; the shards exist."""
    where = folder / INDEX
    if not where.is_file():
        raise FormatError(f"{folder}: {_why_no_weights(folder)}")
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{where}: it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise FormatError(f"{where}: shards must be .safetensors files beside the index, got {', '.join(strange)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FormatError(f"{folder}: shards are missing: {', '.join(missing)}; copy or download them again")
    return weight_map


def _why_no_weights(folder: Path) -> str:
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    if folders.CONFIG in files:
        return "is an adapter, wanted the base model here; the order is BASE ADAPTER OUT"
    for suffix in (".gguf", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".safetensors"):
        weights = [name for name in files if name.endswith(suffix) and name != "training_args.bin"]
        if weights:
            way_out = _why_not_a_folder(Path(weights[0])) if suffix == ".gguf" else _RESAVE
            return f"has {', '.join(weights)} but neither {SINGLE} nor {INDEX}; {way_out}"
    return f"holds no model, wanted {SINGLE} or {INDEX}"


def _companions(folder: Path, single: bool) -> list[Path]:
    """All files but weights, hidden folders, checkpoints of a training run, and an adapter, which transformers would
    load on top of the merged model. Parts of a sentence-transformers model are kept whole."""
    parts = _module_folders(folder)
    kept, broken, linked = [], [], []
    for root, inner, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        inner[:] = sorted(f for f in inner if not f.startswith((".", "checkpoint-")))
        linked += [inside / name for name in inner if (folder / inside / name).is_symlink()]
        for name in sorted(files):
            whole = inside.parts[:1] in parts
            stale = name.endswith(_WEIGHTS) and name != INDEX
            if whole or not (stale or name == folders.CONFIG or (name == INDEX and single)):
                (kept if (folder / inside / name).is_file() else broken).append(inside / name)
    if outside := [path for path in kept if not _is_inside(folder, path)]:
        raise FormatError(
            f"{folder}: links that lead out of the folder: {', '.join(map(str, outside))}; a merge would copy what they"
            " point at: put the files themselves there, or remove the links"
        )
    if linked:
        raise FormatError(
            f"{folder}: links to folders: {', '.join(map(str, linked))}; a merge does not follow them: put the folders"
            " themselves there, or remove the links"
        )
    if broken:
        raise FormatError(
            f"{folder}: not regular files, or broken links: {', '.join(map(str, broken))}; restore or remove them"
        )
    return kept


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether a file lies inside the folder; those of the hub's cache may link to its blobs."""
    home, target = folder.resolve(), (folder / path).resolve()
    blobs = home.parent.parent / "blobs"
    return target.is_relative_to(home) or (home.parent.name == "snapshots" and target.parent == blobs)


def _module_folders(folder: Path) -> set[tuple[str, ...]]:
    file = folder / "modules.json"
    if not file.is_file():
        return set()
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        paths = [Path(str(module["path"])) for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{file}: not a list of sentence-transformers modules ({error})") from error
    return {path.parts[:1] for path in paths if path.parts}
