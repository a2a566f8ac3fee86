"""What goes with a model's weights: tokenizer, chat template, generation settings. One rule for whatever makes or runs
the model: the adapter's folder goes first where it has them, the base's elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What transformers' tokenizers and RWKV's are saved as; a tokenizer comes whole, with its template and added tokens.
_TOKENIZER = (
    *(TOKENIZER_CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE),
    *(
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "spm.model",
        "sentencepiece.bpe.model",
    ),
    *("source.spm", "target.spm", "bpe.codes", "rwkv_vocab_v20230424.txt"),
)
# Part -> the file by which a folder has it, and all of its files.
_PARTS = {
    "tokenizer": (TOKENIZER_CONFIG, _TOKENIZER),
    "chat template": (TEMPLATE, (TEMPLATE,)),
    "generation settings": (GENERATION, (GENERATION,)),
}


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights of a base with adapters.

    Attributes:
        files: name -> file of an adapter's folder.
        left_out: names of files that the base's folder may have and that are not used.
        words: where each part is from, for one line.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    words: str = ""

    def copy_to(self, folder: Path) -> None:
        """Put the adapters' files into a folder with the base's."""
        for name in self.left_out:
            (folder / name).unlink(missing_ok=True)
        for name, file in self.files.items():
            shutil.copy(file, folder / name)


def beside(adapters: Sequence[Path]) -> Beside:
    """What adapters bring. Where several bring different ones, the base's are used, and the words say so."""
    files: dict[str, Path] = {}
    left_out: set[str] = set()
    words = []
    for part, (marker, names) in _PARTS.items():
        holders = [folder for folder in adapters if (folder / marker).is_file()]
        if not holders or (part == "chat template" and TOKENIZER_CONFIG in files):
            continue
        contents = [_contents(folder, names) for folder in holders]
        if any(content != contents[0] for content in contents):
            words.append(f"{part} of the base, since the adapters' differ")
            continue
        files |= {name: holders[0] / name for name in contents[0]}
        left_out |= {*names} - contents[0].keys()
        words.append(f"{part} of {holders[0]}")
    return Beside(files, frozenset(left_out), ", ".join(words))


def _contents(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def tokenizer_folder(merged: Path) -> Path:
    """Where a merge into a `.pth` file leaves what adapters bring; such a file has no folder of its own."""
    return merged.with_suffix(".tokenizer")


def beside_model(model: str, adapters: Sequence[Path]) -> Beside:
    """What takes the place of a model's own when it is run: what its adapters bring, or what its merge left."""
    brought = beside(adapters)
    if not brought.files and model.endswith(".pth"):
        return beside([tokenizer_folder(Path(model).expanduser())])
    return brought
