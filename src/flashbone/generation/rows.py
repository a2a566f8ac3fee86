"""What rows ask: a prompt each, in any layout that `flashbone train` reads, and the adapter that is to answer."""

import itertools
import json
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FormatError, shortened
from flashbone.train.data.conversations import is_blank, kind
from flashbone.train.data.counts import listed
from flashbone.train.data.formats import SHOWN_BAD_ROWS, converter
from flashbone.train.data.layouts import FORMATS, RowFormat
from flashbone.train.data.rows import BadRow, read_rows
from flashbone.train.data.tokens import Talk, text_ids

GENERATED, TOKENS, ADAPTER = "generated", "generated_tokens", "adapter"  # columns
STAND_IN = "-"  # for the answer of a row that has none yet, so that every row is read as training reads it
WITHOUT_TEMPLATE = ("alpaca", "text")  # their prompts are whole texts


@dataclass(frozen=True)
class Asked:
    """One row.

    Attributes:
        place: where it is, for errors.
        row: as it is in the file.
        text: the prompt, if it is a text.
        talk: else the conversation up to the answer, as JSON text.
        is_whole: the text is never put into a chat template.
        adapter: the name of the one that answers; None for the base alone.
    """

    place: str
    row: dict[str, Any]
    text: str | None
    talk: str | None = None
    is_whole: bool = False
    adapter: str | None = None

    def ids(self, tokenizer: Any, system: str | None, chat_template: bool) -> list[int]:
        """The tokens of the prompt.

        Args:
            tokenizer: The model's.
            system: A system prompt for rows without one.
            chat_template: Make a text the user's turn, where the tokenizer has a chat template.

        Raises:
            FormatError: the row needs a chat template and there is none, or the template refuses it.
        """
        if self.text is not None and (self.is_whole or not chat_template or tokenizer.chat_template is None):
            if system is not None:
                raise FormatError(
                    f"{self.place}: is text outside a chat template, which has no system prompt; leave out --system"
                )
            return text_ids(tokenizer, self.text)
        if tokenizer.chat_template is None:
            raise FormatError(f"{self.place}: is a conversation, but the tokenizer has no chat template")
        content = {"messages": [{"role": "user", "content": self.text}], "learned": []}
        content = json.loads(self.talk) if self.talk is not None else content
        if system is not None and content["messages"][0]["role"] != "system":
            content["messages"].insert(0, {"role": "system", "content": system})
        talk = Talk.read(json.dumps(content), tokenizer)
        try:
            return talk.ids(talk.written(talk.messages, answer_follows=True))
        except FormatError as error:
            raise FormatError(f"{self.place}: {error}") from error


def read_asked(
    path: Path, adapters: Collection[str], columns: dict[str, str] | None = None, limit: int | None = None
) -> list[Asked]:
    """The rows of a file.

    Args:
        path: Rows as `flashbone train` reads them; they may lack their answers.
        adapters: The names that rows may choose from in the column "adapter".
        columns: Our names of columns to the file's.
        limit: Read only so many rows.

    Raises:
        FormatError: the file cannot be read, or rows ask nothing; the first few are named.
        ConfigError: a row names an adapter that was not given, or does not choose among several.
    """
    columns, asked, bad = columns or {}, [], []
    format = None
    with closing(read_rows(path)) as rows:
        for entry in itertools.islice(rows, limit):
            if isinstance(entry, BadRow):
                bad.append(str(entry))
                continue
            place, row = entry
            try:
                if not isinstance(row, dict):
                    raise FormatError(f"holds a {type(row).__name__}; an object with named columns was wanted")
                format = format or _format_of(row, columns, str(path))
                asked.append(_asked(place, row, format, columns, adapters))
            except (FormatError, RecursionError) as error:
                bad.append(f"{place}: {error or 'is nested too deeply'}")
    if bad:
        raise FormatError(shortened(bad, SHOWN_BAD_ROWS, "; "))
    if not asked:
        raise FormatError(f"{path}: no rows")
    return asked


def _answer_of(entry: RowFormat) -> str | None:
    """The column of a layout that holds the answer; None where answers are turns, or there are none."""
    return entry.needed[1] if len(entry.needed) == 2 else None


def _format_of(row: dict[str, Any], columns: dict[str, str], where: str) -> str:
    """The layout of rows like this one: that in which training reads them, or whose prompt they have."""
    sft = {name: entry for name, entry in FORMATS.items() if "sft" in entry.tasks and not entry.is_tokenised}
    known = {column for entry in sft.values() for column in entry.columns}
    if wrong := [f"{ours}={theirs}" for ours, theirs in columns.items() if ours not in known or theirs not in row]:
        raise ConfigError(
            f"columns: {', '.join(wrong)}: {where} has {listed(row)}, and prompts are read from {listed(known)}"
        )
    has = {*row, *columns} - set(columns.values()).difference(columns)
    for name, entry in sft.items():
        if has.issuperset(entry.needed):
            return name
    for name, entry in sft.items():
        if has.issuperset({*entry.needed} - {_answer_of(entry)}):
            return name
    prompts = dict.fromkeys(entry.needed[0] for entry in sft.values())
    raise FormatError(
        f"{where}: columns {listed(row)} hold no prompt; wanted one of {', '.join(prompts)}; name it,"
        " as in --columns prompt=ask"
    )


def _asked(place: str, row: dict[str, Any], format: str, columns: dict[str, str], adapters: Collection[str]) -> Asked:
    if taken := [name for name in (GENERATED, TOKENS) if name in row]:
        raise FormatError(f"has a column {taken[0]!r} already, where answers are written; rename or remove it")
    adapter = _adapter_of(row, adapters)
    entry = FORMATS[format]
    content = {name: value for name, value in row.items() if name != ADAPTER}
    if (answer := _answer_of(entry)) is not None:
        prompt = row.get(columns.get(entry.needed[0], entry.needed[0]))
        stand_in = [{"role": "assistant", "content": STAND_IN}] if isinstance(prompt, list) else STAND_IN
        theirs = columns.get(answer, answer)
        if is_blank(content.get(theirs)):
            content[theirs] = stand_in
    elif entry.turns:
        theirs = columns.get(entry.turns[0], entry.turns[0])
        content[theirs] = _answered(content.get(theirs))
    example = converter(format, columns, refuse_context=not columns)(content)
    if "images" in example:
        raise FormatError("is about images, and only texts are answered here; ask through transformers' pipeline")
    if "conversation" in example:
        talk = json.loads(example["conversation"])
        talk["messages"].pop()
        return Asked(place, row, None, json.dumps(talk), adapter=adapter)
    text = example["prompt"] if "prompt" in example else example["text"]
    return Asked(place, row, text, is_whole=format in WITHOUT_TEMPLATE, adapter=adapter)


def _answered(turns: Any) -> Any:
    """A conversation with its answer, if it has none yet."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return turns
    last = turns[-1]
    if str(last.get("role", last.get("from"))).lower() in ("assistant", "gpt", "chatgpt", "model"):
        return turns
    keys = ("from", "value") if "from" in last and "role" not in last else ("role", "content")
    return [*turns, dict(zip(keys, ("assistant", STAND_IN), strict=True))]


def _adapter_of(row: dict[str, Any], adapters: Collection[str]) -> str | None:
    """The adapter that answers a row: the one that it names, null for none; else the only one."""
    if ADAPTER not in row:
        if len(adapters) > 1:
            raise FormatError(
                f"has no column {ADAPTER!r}, and there are several: {', '.join(adapters)}; name one, or null for the"
                " base"
            )
        return next(iter(adapters), None)
    name = row[ADAPTER]
    if name is None or name in adapters:
        return name
    wanted = " or ".join([*map(repr, adapters), "null for the base"])
    raise FormatError(
        f"{ADAPTER!r} is {name!r:.60}; wanted {wanted}"
        if isinstance(name, str)
        else f"{ADAPTER!r} is {kind(name)}; wanted {wanted}"
    )
