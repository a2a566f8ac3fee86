"""Formats of rows: the columns that each needs, and the example that a row becomes.

An example is one of
    {"text"}                    every token is learned
    {"prompt", "completion"}    the completion is learned, as in TRL's prompt-completion data
    {"conversation"}            JSON text: "messages" as the chat template sees them, "learned" (a truth for each
                                message), and "tools" and "chat_template_kwargs" where a row has them
    {"text", "label"}           classification
    {"input_ids"}               token ids: every one is learned
    {"question", "answer"}      the model's answer is compared with this one
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.rows import BadRow, Row

# The template of Stanford Alpaca, which the Bone paper trains and tests with.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

# Other names under which `auto` finds prompts and completions.
PAIRS = [("query", "response"), ("question", "answer"), ("prompt", "response"), ("instruction", "response")]

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# Columns of tokenised data that can mark tokens as not learned.
MASKS = ("labels", "attention_mask", "completion_mask", "assistant_masks")
MAX_ID = 2**31  # what datasets stores token ids in
SHOWN_BAD_ROWS = 5

Columns = dict[str, str]  # our name -> the data's name
Example = dict[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    Attributes:
        convert: Makes an example of a row that has the needed columns; raises FormatError with what is wrong.
        needed: Columns without which a row is not of this format.
        optional: Columns that are used where they exist.
        task: The task whose rows have this format: sft, classification or exact_match.
        has_prompt: A template may go around the example's prompt.
        is_tokenised: Its examples are documents of token ids, which are cut into windows.
    """

    convert: Callable[[dict[str, Any]], Example]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    task: str = "sft"
    has_prompt: bool = False
    is_tokenised: bool = False


def column_names(task: str) -> list[str]:
    """Our names of the columns that formats of a task read."""
    formats = [entry for entry in FORMATS.values() if entry.task == task]
    return list(dict.fromkeys(name for entry in formats for name in (*entry.needed, *entry.optional)))


def choose_format(
    row: Any, task: str, where: str, asked: str = "auto", columns: Columns | None = None
) -> tuple[str, Columns]:
    """The format of rows like this one, and the full mapping of our column names to the data's.

    Args:
        row: The first row of the data that has columns; None if there is none.
        task: sft, classification or exact_match.
        where: The data's name, for errors.
        asked: The format, or auto: the first in the table whose columns exist.
        columns: Our names to the data's.

    Raises:
        ConfigError: no such format, or one of another task; a column that no format reads, or that does not exist.
        FormatError: no format fits.
    """
    columns = columns or {}
    names = [name for name, entry in FORMATS.items() if entry.task == task]
    if asked not in ("auto", *FORMATS):
        raise ConfigError(f"data.format: got {asked!r}, wanted auto, {', '.join(names)}")
    if asked != "auto" and asked not in names:
        raise ConfigError(f"data.format {asked} does not go with task {task}")
    if not isinstance(row, dict) or not row:  # reading on reports what is wrong
        return (names[0] if asked == "auto" else asked), columns
    _check_columns(row, columns, task, where)
    if asked != "auto":
        return asked, columns
    for name in names:
        if {*row, *columns}.issuperset(FORMATS[name].needed):
            return name, columns
    for prompt, completion in PAIRS if task == "sft" and not columns else ():
        if prompt in row and completion in row:
            return "prompt-completion", {"prompt": prompt, "completion": completion}
    remedy = {
        "sft": "data.columns: {prompt: question, completion: answer}",
        "classification": "data.columns: {text: review, label: stars}",
        "exact_match": "--columns question=query,answer=response",
    }[task]
    raise FormatError(f"{where}: columns {_list(row)} fit no format of task {task}; name them, as in {remedy}")


def _check_columns(row: Collection[str], columns: Columns, task: str, where: str) -> None:
    known = column_names(task)
    needed = {name for entry in FORMATS.values() if entry.task == task for name in entry.needed}
    problems = [f"{name!r} is not a name of task {task} ({', '.join(known)})" for name in columns if name not in known]
    problems += [
        f"no column {theirs!r} in {where}, which has {_list(row)}"
        for name, theirs in columns.items()
        if theirs not in row and name in needed
    ]
    if problems:
        raise ConfigError("data.columns: " + "; ".join(problems))


def converter(format: str, columns: Columns, turns: str = "all") -> Callable[[Any], Example]:
    """The function from a row of this format to an example; it raises FormatError with what is wrong in the row.

    Args:
        format: The format's name.
        columns: Our names of columns to the data's.
        turns: Which answers of a conversation are learned: all, or the last.
    """
    entry = FORMATS[format]

    def convert(row: Any) -> Example:
        if not isinstance(row, dict):
            raise FormatError(f"holds a {type(row).__name__}; an object with named columns was wanted")
        named = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
        missing = [columns.get(name, name) for name in entry.needed if named.get(name) is None]
        if missing:
            raise FormatError(f"no {' and no '.join(map(repr, missing))}; it has {_list(row)}")
        return _packed(entry.convert(named), turns)

    return convert


def open_examples(
    rows: Iterator[Row | BadRow],
    task: str,
    where: str,
    asked: str = "auto",
    columns: Columns | None = None,
    turns: str = "all",
) -> tuple[str, Columns, Iterator[Example]]:
    """The format of the rows, their columns, and their examples; arguments and errors as in `choose_format` and
    `converter`.

    At their end the examples raise one FormatError that names the bad rows, or that there are none.
    """
    start: list[Row | BadRow] = []
    first = None
    for row in rows:
        start.append(row)
        if not isinstance(row, BadRow) and isinstance(row[1], dict) and row[1]:
            first = row[1]
            break
    format, columns = choose_format(first, task, where, asked, columns)
    return format, columns, _converted(itertools.chain(start, rows), converter(format, columns, turns), where)


def _converted(rows: Iterator[Row | BadRow], convert: Callable[[Any], Example], where: str) -> Iterator[Example]:
    bad: list[str] = []
    count = 0
    for row in rows:
        count += 1
        if isinstance(row, BadRow):
            bad.append(str(row))
            continue
        place, content = row
        try:
            yield convert(content)
        except FormatError as error:
            bad.append(f"{place}: {error}")
    if not count:
        raise FormatError(f"{where}: no rows")
    if bad:
        more = f"; and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
        raise FormatError("; ".join(bad[:SHOWN_BAD_ROWS]) + more)


def answers(conversation: str) -> list[Example]:
    """A prompt and completion for each learned answer of a conversation.

    Each prompt is the conversation up to that answer, which is what the model sees when it gives it; masking one
    long sequence instead would need a chat template that marks the answers, and few do.
    """
    talk = json.loads(conversation)
    messages, tools = talk["messages"], talk.get("tools")
    along = {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
    ends = [number for number, is_learned in enumerate(talk["learned"]) if is_learned]
    return [{"prompt": messages[:i], "completion": [messages[i]], **along} for i in ends]


def _text(row: dict[str, Any]) -> Example:
    return {"text": _string(row, "text")}


def _prompt_completion(row: dict[str, Any]) -> Example:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _conversation([*row["prompt"], *row["completion"]], context=len(row["prompt"]))
    return {"prompt": _string(row, "prompt"), "completion": _string(row, "completion")}


def _messages(row: dict[str, Any]) -> Example:
    return _conversation(row["messages"])


def _sharegpt(row: dict[str, Any]) -> Example:
    return _conversation(row["conversations"])


def _alpaca(row: dict[str, Any]) -> Example:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    extra = row.get("input")
    if not isinstance(extra, str | None):
        raise FormatError(f"'input' is {_kind(extra)}; text was wanted")
    if not (extra and extra.strip()):
        return {"prompt": ALPACA.format(instruction=instruction), "completion": output}
    return {"prompt": ALPACA_WITH_INPUT.format(instruction=instruction, input=extra), "completion": output}


def _classification(row: dict[str, Any]) -> Example:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise FormatError(f"'label' is {_kind(label)}; a name or a whole number was wanted")
    return {"text": _string(row, "text"), "label": str(label)}


def _questions(row: dict[str, Any]) -> Example:
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise FormatError(f"'answer' is {_kind(answer)}; text or a number was wanted")
    return {"question": _string(row, "question"), "answer": str(answer)}


def _tokens(row: dict[str, Any]) -> Example:
    ids = row["input_ids"]
    if hasattr(ids, "dtype"):  # an array of integers
        if ids.size and not 0 <= ids.min() <= ids.max() < MAX_ID:
            raise FormatError(f"'input_ids' go from {ids.min()} to {ids.max()}; token ids were wanted")
        return {"input_ids": ids}
    if not isinstance(ids, list) or not ids:
        raise FormatError(f"'input_ids' is {_kind(ids)}; a list of token ids was wanted")
    wrong = [id for id in ids if type(id) is not int or not 0 <= id < MAX_ID]
    if wrong:
        raise FormatError(f"'input_ids' holds {wrong[0]!r}; token ids were wanted")
    for name in MASKS:
        mask = row.get(name)
        if mask is not None and (mask != ids if name == "labels" else not all(mask)):
            raise FormatError(f"{name!r} leaves tokens out, but every token of 'input_ids' is learned; use prompts")
    return {"input_ids": ids}


def _conversation(turns: Any, context: int = 1) -> Example:
    """The conversation of these turns; those before the number `context` are not learned."""
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"the conversation is {_kind(turns)}; a list of turns was wanted")
    by_role = isinstance(turns[0], dict) and "from" not in turns[0]
    role_key, content_key = ("role", "content") if by_role else ("from", "value")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {role_key, content_key} <= set(turn):
            raise FormatError(f"turn {number} needs {role_key!r} and {content_key!r}")
        role, content = ROLES.get(str(turn[role_key])), turn[content_key]
        if role is None:
            raise FormatError(f"turn {number}: unknown {role_key} {turn[role_key]!r}; one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise FormatError(f"turn {number}: {content_key!r} is {_kind(content)}; text was wanted")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise FormatError(f"a conversation must end with the assistant's answer, not with the {messages[-1]['role']}")
    learned = [message["role"] == "assistant" and i >= context for i, message in enumerate(messages)]
    return {"conversation": {"messages": messages, "learned": learned}}


def _packed(example: Example, turns: str) -> Example:
    """The example with its conversation, if it has one, as text: Arrow would give all rows the same keys and types."""
    talk = example.get("conversation")
    if talk is None:
        return example
    if turns == "last":
        last = max(i for i, message in enumerate(talk["messages"]) if message["role"] == "assistant")
        talk["learned"] = [is_learned and i == last for i, is_learned in enumerate(talk["learned"])]
    return {"conversation": json.dumps(talk, ensure_ascii=False)}


def _string(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{name!r} is {_kind(value)}; text was wanted")
    return value


def _kind(value: Any) -> str:
    if value is None or (isinstance(value, str | list) and not value):
        return "empty"
    if isinstance(value, str) and value.isspace():
        return "blank"
    return f"of type {type(value).__name__} ({str(value)[:40]})"


def _list(names: Collection[str]) -> str:
    return ", ".join(map(str, names)) or "none"


# The table. The first format of a task whose columns exist is taken in `auto`.
FORMATS = {
    "messages": RowFormat(_messages, ("messages",)),
    "sharegpt": RowFormat(_sharegpt, ("conversations",)),
    "alpaca": RowFormat(_alpaca, ("instruction", "output"), ("input",), has_prompt=True),
    "prompt-completion": RowFormat(_prompt_completion, ("prompt", "completion"), has_prompt=True),
    "text": RowFormat(_text, ("text",)),
    "tokens": RowFormat(_tokens, ("input_ids",), is_tokenised=True),
    "classification": RowFormat(_classification, ("text", "label"), task="classification"),
    "questions": RowFormat(_questions, ("question", "answer"), task="exact_match"),
}
