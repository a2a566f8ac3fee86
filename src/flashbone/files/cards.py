"""Model cards: the README.md beside an adapter: what it is, who loads it, and how it is merged and converted.

How it is used is in the words of its format (`AdapterFormat.usage`).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from flashbone.errors import shortened, visible
from flashbone.files.formats import AdapterCard

BEGIN, END = "<!-- flashbone: begin -->", "<!-- flashbone: end -->"
TAGS = ("bone", "flashbone")
_MOST_NAMES = 12
_OURS = re.compile(f"{BEGIN}((?!{BEGIN}).)*?{END}", re.DOTALL)


def put(card: AdapterCard, file: Path) -> None:
    """Write a card, or renew our part of an existing one; its other text stays."""
    if not file.exists():
        file.write_text(page(card), encoding="utf-8")
        return
    from huggingface_hub import ModelCard  # late: reading adapters needs no hub

    written = ModelCard.load(file, ignore_metadata_errors=True)
    written.data["tags"] = sorted({*(written.data.get("tags") or ()), *TAGS})
    written.text = with_section(written.text, card)
    written.save(file)


def page(card: AdapterCard) -> str:
    """A whole README.md, with the hub's metadata at its head."""
    from huggingface_hub import ModelCardData

    library = "peft" if card.format.peft_type else "flashbone"
    data = ModelCardData(library_name=library, base_model=card.base, tags=list(TAGS))
    return f"---\n{data.to_yaml()}\n---\n\n# Adapter\n\n{section(card)}\n"


def section(card: AdapterCard) -> str:
    """The part of a card that is ours, between two markers."""
    rows = {
        "format": card.format.name,
        "variant": f"`{card.variant}` (Bone family)" if card.variant else "plain LoRA",
        "r" if card.variant else "rank": ", ".join(map(str, card.r)),
        "targets": _targets(card.targets),
        "base model": _code(card.base) if card.base else "not recorded",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    return f"{BEGIN}\n## Adapter facts\n\n{table}\n\n{card.format.usage(card)}{END}"


def with_section(text: str, card: AdapterCard) -> str:
    """A card's text with our part new: in its place, or at the end of a text that has none. Stray markers are text."""
    if ours := _OURS.search(text):
        return text[: ours.start()] + section(card) + text[ours.end() :]
    return f"{text.rstrip()}\n\n{section(card)}"


def _targets(names: Iterable[str]) -> str:
    """The last parts of the names, since layers are many and roles few."""
    last = sorted({name.rpartition(".")[2] if re.fullmatch(r"[\w.]+", name) else name for name in names})
    return shortened(map(_code, last), _MOST_NAMES)


def _code(text: str) -> str:
    """Foreign text that Markdown does not read, in one cell of a table; it cannot end our part of the card."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "\\|").replace("<!--", "<! --").replace("-->", "-- >")
    return f"`{visible(plain)}`"


def part(title: str, *paragraphs: str) -> str:
    """A part of a card's section."""
    return "\n\n".join([f"### {title}", *paragraphs, ""])


def shell(*commands: str) -> str:
    """A block of shell commands."""
    return "\n".join(["```sh", *commands, "```"])


def load(card: AdapterCard, with_bone: bool = False) -> str:
    """A block of Python that loads base and adapter; `with_bone`: PEFT needs its BONE method for it."""
    if card.has_pth_base:
        first, base = ("from flashbone.rwkv import from_pth", 'from_pth("BASE.pth")')
        imports = [f"{first}  # and gives PEFT its BONE method" if with_bone else first]
    else:
        base = 'AutoModelForCausalLM.from_pretrained("BASE")'
        why = "  # gives PEFT its BONE method" if with_bone else "  # knows RWKV's classes"
        imports = [f"import flashbone{why}"] if with_bone or card.is_rwkv else []
        imports.append("from transformers import AutoModelForCausalLM")
    adapted = 'model = PeftModel.from_pretrained(base, "ADAPTER")'
    return "\n".join(["```python", *imports, "from peft import PeftModel", "", f"base = {base}", adapted, "```"])


def merging(card: AdapterCard) -> str:
    """The part on merging."""
    end = ".pth" if card.has_pth_base else ""
    return part("Merge", shell(f"flashbone merge BASE{end} ADAPTER OUT{end}"))
