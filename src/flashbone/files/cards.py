"""Model cards: the README.md beside an adapter: what it is, who loads it, and how it is merged and converted.

How it is used is in the words of its format (`AdapterFormat.usage`). Where the base is known, every line works when it
is pasted in the adapter's folder.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flashbone.errors import escaped, shortened, visible
from flashbone.files.formats import AdapterCard
from flashbone.files.sources import is_hub_id

BEGIN, END = "<!-- flashbone: begin -->", "<!-- flashbone: end -->"
RUN, RUN_END = "<!-- flashbone run: begin -->", "<!-- flashbone run: end -->"
TAGS = ("bone", "flashbone")
_MOST_NAMES = 12
# Ending of a model's class -> the Auto class that loads it, and the hub's name of its task; PEFT's name of that task.
_AUTO = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation", "CAUSAL_LM"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation", ""),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification", "SEQ_CLS"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification", "TOKEN_CLS"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering", "QUESTION_ANS"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask", ""),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification", ""),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation", "SEQ_2_SEQ_LM"),
    "Model": ("AutoModel", "feature-extraction", "FEATURE_EXTRACTION"),
}
_NEW_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_BLANK = re.compile(r"^#+ [^\n]*\n+(?:<!--[^\n]*-->\n+)?\[?More information needed\]?\n*", re.MULTILINE | re.IGNORECASE)
_OURS = re.compile(f"{BEGIN}((?!{BEGIN}).)*?{END}", re.DOTALL)
# TRL shows how to load a base that it has no name for.
_NO_START = re.compile(r'^## Quick start\n((?!^## ).)*?model="None".*?(?=^## |\Z)', re.MULTILINE | re.DOTALL)
_NO_BASE = re.compile(r"\[None\]\(https://huggingface\.co/None\)")


def put(card: AdapterCard, file: Path) -> None:
    """Write a card, or renew our part of an existing one; its other text stays, but for what its writer left blank."""
    from huggingface_hub import ModelCard  # late: reading adapters needs no hub

    if not file.exists():
        file.write_text(page(card), encoding="utf-8")
        return
    written = ModelCard.load(file, ignore_metadata_errors=True)
    ours = _metadata(card)
    named = written.data.get("base_model")
    if ours["base_model"] or (isinstance(named, str) and Path(named).exists()):
        written.data["base_model"] = ours["base_model"]  # the hub refuses folders of this machine
    written.data["library_name"] = ours["library_name"]
    written.data["tags"] = sorted({*(written.data.get("tags") or ()), *ours["tags"]})
    for name in ("pipeline_tag", "license"):
        written.data[name] = written.data.get(name) or ours[name]
    if written.data.get("licence") == "license":  # TRL's, which no hub reads
        written.data["licence"] = None
    text = _NO_START.sub("", _BLANK.sub("", written.text))
    text = _NO_BASE.sub(lambda _: _code(card.base) if card.base else "its base", text)
    written.text = with_section(text, card)
    written.save(file)


def put_run(file: Path, facts: Mapping[str, str], recipe: str) -> None:
    """Add to a card what a run measured and what it was asked for; a later run of the same folder renews it."""
    rows = "\n".join(f"- {name}: {visible(value)}" for name, value in facts.items())
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", recipe)), default=0))
    part = f"{RUN}\n## Training\n\n{rows}\n\n{fence}yaml\n{escaped(recipe, keep=chr(10))}{fence}\n{RUN_END}"
    text = file.read_text(encoding="utf-8")
    start, end = text.find(RUN), text.rfind(RUN_END)
    text = text[:start] + part + text[end + len(RUN_END) :] if 0 <= start < end else f"{text.rstrip()}\n\n{part}\n"
    file.write_text(text, encoding="utf-8")


def page(card: AdapterCard) -> str:
    """A whole README.md, with the hub's metadata at its head."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(**{name: value for name, value in _metadata(card).items() if value})
    return f"---\n{data.to_yaml()}\n---\n\n# Adapter\n\n{section(card)}\n"


def section(card: AdapterCard) -> str:
    """The part of a card that is ours, between two markers."""
    rows = {
        "format": card.format.name,
        "variant": f"`{card.variant}` (Bone family)" if card.variant else "plain LoRA",
        "r" if card.variant else "rank": ", ".join(map(str, card.r)),
        "layers": _targets(card.targets),
        "base model": _code(_known_base(card) or card.base) if card.base else "not recorded",
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in rows.items())
    where = "Run this in the adapter's folder" + (
        "." if _known_base(card) else ", with your base in the place of BASE."
    )
    return f"{BEGIN}\n## Adapter\n\n{facts}\n\n{where}\n\n{card.format.usage(card)}{END}"


def with_section(text: str, card: AdapterCard) -> str:
    """A card's text with our part new: in its place, or at the end of a text that has none. Stray markers are text."""
    if ours := _OURS.search(text):
        return text[: ours.start()] + section(card) + text[ours.end() :]
    return f"{text.rstrip()}\n\n{section(card)}"


def _metadata(card: AdapterCard) -> dict[str, Any]:
    """What the hub reads at the head of a card. A base that is a folder of this machine stays out: it refuses those."""
    on_hub = card.base if card.base and is_hub_id(card.base) and not Path(card.base).exists() else None
    _, task = _auto(card)
    return {
        "library_name": "peft" if card.format.peft_type else "flashbone",
        "base_model": on_hub,
        "pipeline_tag": task or None,
        "license": _license(card.base) or "unknown",
        "tags": [*TAGS, *card.tags, *([f"base_model:adapter:{on_hub}"] if on_hub else [])],
    }


def _license(base: str | None) -> str | None:
    """The licence that the base's own card names, where that card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if not base:
        return None
    found: Any = Path(base) / "README.md"
    if not found.is_file() and is_hub_id(base):
        found = try_to_load_from_cache(base, "README.md")
    if not isinstance(found, (str, Path)) or not Path(found).is_file():
        return None
    named = ModelCard.load(found, ignore_metadata_errors=True).data.get("license")
    return named if isinstance(named, str) else None


def _auto(card: AdapterCard) -> tuple[str, str]:
    """The Auto class that loads the base, and the hub's name of its task; empty where transformers has none."""
    if card.architecture is not None:
        return next((row[:2] for end, row in _AUTO.items() if card.architecture.endswith(end)), ("", ""))
    by_task = {task: (auto, tag) for auto, tag, task in _AUTO.values() if task}
    return by_task.get(card.task_type or "CAUSAL_LM", ("AutoModel", ""))


def _targets(names: Iterable[str]) -> str:
    """Full names, those that differ in numbers as one with their count."""
    alike = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)
    return shortened((_code(name) + (f" ({n})" if n > 1 else "") for name, n in sorted(alike.items())), _MOST_NAMES)


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


def base_word(card: AdapterCard) -> str:
    """The base as a word of a command: its hub id or its path; BASE where that is not known."""
    return shlex.quote(_known_base(card)) if _known_base(card) else "BASE" + ".pth" * card.has_pth_base


def _known_base(card: AdapterCard) -> str:
    """The base's hub id, or its full path; empty where it is not known, or no text for a command."""
    base = card.base or ""
    if not base or "`" in base or escaped(base) != base:
        return ""
    return str(Path(base).absolute()) if Path(base).exists() else base if is_hub_id(base) else ""


def load(card: AdapterCard, with_bone: bool = False) -> str:
    """A block of Python that loads base and adapter; `with_bone`: PEFT needs its BONE method for it."""
    auto, _ = _auto(card)
    known = json.dumps(_known_base(card), ensure_ascii=False) if _known_base(card) else f'"{base_word(card)}"'
    why = "  # gives PEFT its BONE method" if with_bone else "  # knows RWKV's classes"
    imports = [f"import flashbone{why}"] if with_bone or card.is_rwkv else []
    if card.has_pth_base:
        first = "from flashbone.rwkv import from_pth"
        imports, base = [f"{first}  # and gives PEFT its BONE method" if with_bone else first], f"from_pth({known})"
    elif auto:
        imports.append(f"from transformers import {auto}")
        more = f", num_labels={card.labels}" if card.labels else ""
        if card.has_gguf_base:
            file = Path(_known_base(card))
            known, more = json.dumps(str(file.parent), ensure_ascii=False), f', gguf_file="{file.name}"'
        base = f"{auto}.from_pretrained({known}{more})"
    else:
        base = "...  # the model that the adapter was trained on"
    adapted = 'model = PeftModel.from_pretrained(base, ".")'
    return "\n".join(["```python", *imports, "from peft import PeftModel", "", f"base = {base}", adapted, "```"])


def merging(card: AdapterCard, adapter: str = ".") -> str:
    """The part on merging: by the command, or in Python where the base's files lack what the adapter has."""
    new_head = card.task_type in _NEW_HEADS or _auto(card)[0].endswith(("Classification", "QuestionAnswering"))
    if new_head or card.has_gguf_base or not (_auto(card)[0] or card.has_pth_base):
        code = 'model.merge_and_unload().save_pretrained("../merged")'
        return part("Merge", "In Python, after loading as above:", "\n".join(["```python", code, "```"]))
    end = ".pth" if card.has_pth_base else ""
    return part("Merge", shell(f"flashbone merge {base_word(card)} {adapter} ../merged{end}"))
