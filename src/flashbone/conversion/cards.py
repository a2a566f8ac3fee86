"""Model cards: the README.md beside an adapter says what it is, who loads it, and how it is merged and converted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

BEGIN, END = "<!-- flashbone: begin -->", "<!-- flashbone: end -->"
TAGS = ("bone", "flashbone")
_HUB_ID = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+")  # needs no quotes in YAML
_MOST_NAMES = 12
_RWKV_NAME = re.compile(r"(emb|head|ln_out|blocks\.\d+\.(att|ffn|ln\d))(\.|$)")  # in RWKV's own checkpoints
_OURS = re.compile(f"{BEGIN}((?!{BEGIN}).)*?{END}", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        format: "peft", "miss", "lora", "rwkv-peft" or "gguf".
        variant: of the adapter; None: it is a plain LoRA.
        r: its block sizes, or the rank.
        targets: names of the adapted layers, or a pattern.
        base: folder or hub id of the base model, if known.
        linear_only: it adapts linear layers, and nothing else; a LoRA: and holds nothing else.
        fits_lora: a LoRA has a place for all that it adapts.
        fits_rwkv: it adapts linear layers of RWKV, by the names of RWKV's own checkpoints.
        is_rwkv: the names are those of RWKV's own checkpoints as they are: flashbone's classes have these, no others.
    """

    format: str
    variant: str | None
    r: tuple[int, ...]
    targets: tuple[str, ...]
    base: str | None
    linear_only: bool = False
    fits_lora: bool = False
    fits_rwkv: bool = False
    is_rwkv: bool = False

    @property
    def has_pth_base(self) -> bool:
        """Whether the base is an RWKV model's `.pth` file, as far as is known."""
        return self.base.endswith(".pth") if self.base else self.is_rwkv


def are_own_rwkv(names: Iterable[str]) -> bool:
    """Whether these are names in RWKV's own checkpoints, as they are."""
    return all(map(_RWKV_NAME.match, names))


def are_rwkv(names: Iterable[str]) -> bool:
    """Whether these are names in RWKV's own checkpoints, all as they are or all after one and the same leading part."""
    known = list(names)
    leads, cut = {name.partition(".")[0] for name in known}, [name.partition(".")[2] for name in known]
    return are_own_rwkv(known) or (len(leads) == 1 and are_own_rwkv(cut))


def page(card: Card) -> str:
    """A whole README.md, with the hub's metadata at its head."""
    library = "peft" if card.format in ("peft", "miss", "lora") else "flashbone"
    base = [f"base_model: {card.base if _HUB_ID.fullmatch(card.base) else json.dumps(card.base)}"] if card.base else []
    head = ["---", f"library_name: {library}", *base, "tags:", *(f"- {tag}" for tag in TAGS), "---"]
    return "\n".join([*head, "", "# Adapter", "", section(card), ""])


def section(card: Card) -> str:
    """The part of a card that is ours, between two markers."""
    base = _code(card.base) if card.base else "not recorded"
    what = f"`{card.variant}` (Bone family)" if card.variant else "plain LoRA"
    rows = [
        ("format", card.format),
        ("variant", what),
        ("r" if card.variant else "rank", ", ".join(map(str, card.r))),
        ("targets", _targets(card.targets)),
        ("base model", base),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    parts = [BEGIN, "## Adapter facts", "", *table, "", *_USES[card.format](card), END]
    return "\n".join(parts)


def with_section(text: str, card: Card) -> str:
    """A card's text with our part new: in its place, or at the end of a text that has none. Stray markers are text."""
    if ours := _OURS.search(text):
        return text[: ours.start()] + section(card) + text[ours.end() :]
    return f"{text.rstrip()}\n\n{section(card)}"


def _targets(names: Iterable[str]) -> str:
    """The last parts of the names, since layers are many and roles few."""
    last = sorted({name.rpartition(".")[2] if re.fullmatch(r"[\w.]+", name) else name for name in names})
    more = len(last) - _MOST_NAMES
    return ", ".join(map(_code, last[:_MOST_NAMES])) + (f" and {more} more" if more > 0 else "")


def _code(text: str) -> str:
    """Text that Markdown does not read, in one cell of a table."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


def _shell(*lines: str) -> list[str]:
    return ["```sh", *lines, "```", ""]


def _load(card: Card, with_bone: bool = False) -> list[str]:
    """Python that loads base and adapter; `with_bone`: PEFT needs its BONE method for it."""
    if card.has_pth_base:
        first, base = ("from flashbone.rwkv import from_pth", 'from_pth("BASE.pth")')
        imports = [f"{first}  # and gives PEFT its BONE method" if with_bone else first]
    else:
        base = 'AutoModelForCausalLM.from_pretrained("BASE")'
        why = "  # gives PEFT its BONE method" if with_bone else "  # knows RWKV's classes"
        imports = [f"import flashbone{why}"] if with_bone or card.is_rwkv else []
        imports.append("from transformers import AutoModelForCausalLM")
    load = 'model = PeftModel.from_pretrained(base, "ADAPTER")'
    return _python(*imports, "from peft import PeftModel", "", f"base = {base}", load)


_TO_LORA = "flashbone convert ADAPTER OUT --to lora --base BASE"


# What plain PEFT asks of a layer's sizes, which flashbone does not.
_SIZES = {"bat-col": " if r divides the sizes of its layers", "mini": " if mini_r divides the outputs of its layers"}


def _peft(card: Card) -> list[str]:
    without, commands = _ways_out(card)
    return [
        *("### Load with flashbone", "", *_load(card, with_bone=True)),
        *("### Load without flashbone", "", " ".join(without), ""),
        *(_shell(*commands) if commands else ()),
        *_merging(card),
    ]


def _ways_out(card: Card) -> tuple[list[str], list[str]]:
    """What is said of life without flashbone, and the conversions that will not be refused."""
    words, commands = [], []
    # PEFT's BONE and MISS have linear layers and one r; of RWKV, no class but flashbone's has such names.
    plain = card.linear_only and len(card.r) == 1 and not card.is_rwkv
    sizes = _SIZES.get(card.variant or "", "")
    if plain and card.variant in ("bone", "bat-col"):
        words.append(f"PEFT 0.14 to 0.18 loads it as it is{sizes}.")
    if plain and card.variant in ("bone", "mini", "bat-col"):
        commands.append("flashbone convert ADAPTER OUT --to miss")
        words.append(f"Plain PEFT 0.17 and newer loads it after `--to miss`{sizes}.")
    if card.fits_lora and not card.is_rwkv:
        exact = card.variant in ("bone", "mini")
        commands.append(_TO_LORA + ("" if exact else " --error 0.01"))
        how = "exactly" if exact else "approximately, to the error that is asked for"
        who = "Anything that serves LoRAs" if card.linear_only else "PEFT"
        words.append(f"{who} loads it, {how}, after `--to lora`.")
    if card.fits_rwkv and card.variant in ("bone", "bat-row"):
        commands.append("flashbone convert ADAPTER OUT --to rwkv-peft")
        words.append("RWKV-PEFT reads it after `--to rwkv-peft`.")
    return [*words, "Merged into its base, as below, it always is part of a plain model."], commands


def _miss(card: Card) -> list[str]:
    how = "the model is of a class of flashbone" if card.is_rwkv else "without flashbone"
    return [
        *("### Load", "", f"PEFT 0.17 and newer, {how}:", "", *_load(card)),
        *("### Convert", "", *_shell("flashbone convert ADAPTER OUT --to peft")),
        *_merging(card),
    ]


def _lora(card: Card) -> list[str]:
    is_served = card.linear_only and not card.is_rwkv
    engines = ", and every engine that serves LoRAs" if is_served else ""
    load = ["### Load", "", f"Any version of PEFT{engines}:", "", *_load(card)]
    serve = ["### Serve", "", *_shell("flashbone convert ADAPTER OUT --for vllm --base BASE")]
    return load + (serve if is_served else [])


def _rwkv(card: Card) -> list[str]:
    how = "RWKV-PEFT reads the `.pth` file here (`merge/merge_disha.py`, or as the checkpoint to train on from)."
    return [
        "### Load",
        "",
        how,
        "",
        "### Convert",
        "",
        *_shell("flashbone convert ADAPTER OUT --to peft"),
        *_merging(card),
    ]


def _gguf(card: Card) -> list[str]:
    return ["### Load", "", "With llama.cpp:", "", *_shell("llama-cli -m BASE.gguf --lora adapter.gguf")]


def _merging(card: Card) -> list[str]:
    end = ".pth" if card.has_pth_base else ""
    return ["### Merge", "", *_shell(f"flashbone merge BASE{end} ADAPTER OUT{end}")]


_USES = {"peft": _peft, "miss": _miss, "lora": _lora, "rwkv-peft": _rwkv, "gguf": _gguf}
