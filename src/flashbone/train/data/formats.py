"""What a row of each format must hold, and the example it becomes: a text, a prompt and its completion, or a chat.

An example is one of
    {"text"}                    every token is learned
    {"prompt", "completion"}    the completion is learned, as TRL's prompt-completion data
    {"messages"}                a conversation; `answers` cuts it into prompts and completions
    {"text", "label"}           classification
    {"input_ids"}               token ids: every one is learned
"""

from collections.abc import Callable, Collection
from typing import Any

from flashbone.errors import ConfigError, FormatError

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

# The columns a format reads; the first match decides in `auto`. Optional columns are in brackets.
COLUMNS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "alpaca": ["instruction", "output", "[input]"],
    "prompt-completion": ["prompt", "completion"],
    "classification": ["text", "label"],
    "text": ["text"],
    "tokens": ["input_ids"],
}

# Other names under which `auto` finds prompts and completions.
PAIRS = [("query", "response"), ("question", "answer"), ("prompt", "response"), ("instruction", "response")]

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# Columns of tokenised data that may say that not every token is learned.
MASKS = ("labels", "attention_mask", "completion_mask", "assistant_masks")
MAX_ID = 2**31  # what datasets stores token ids in

Columns = dict[str, str]
Example = dict[str, Any]


def check_columns(names: Collection[str], columns: Columns, where: str) -> None:
    """Raise ConfigError where `columns` maps a name that no format reads, or onto a column that is not there."""
    ours = {name.strip("[]"): name[0] == "[" for wanted in COLUMNS.values() for name in wanted}
    parts = [f"{name!r} is no name of ours ({', '.join(ours)})" for name in columns if name not in ours]
    parts += [
        f"no column {theirs!r} in {where}, which has {_list(names)}"
        for name, theirs in columns.items()
        if theirs not in names and not ours.get(name)
    ]
    if parts:
        raise ConfigError("data.columns: " + "; ".join(parts))


def detect(names: Collection[str], columns: Columns, task: str, where: str) -> tuple[str, Columns]:
    """The format that columns of these names make, and the full mapping of our names to the data's.

    Raises:
        FormatError: no format fits.
    """
    have = set(names) | set(columns)
    for format, wanted in COLUMNS.items():
        fits_task = (format == "classification") == (task == "classification")
        if fits_task and all(name in have for name in wanted if name[0] != "["):
            return format, columns
    if task != "classification" and not columns:
        for prompt, completion in PAIRS:
            if prompt in names and completion in names:
                return "prompt-completion", {"prompt": prompt, "completion": completion}
    example = "{text: review, label: stars}" if task == "classification" else "{prompt: question, completion: answer}"
    raise FormatError(
        f"{where}: columns {_list(names)} fit no format of task {task}; name them, as in data.columns: {example}"
    )


def converter(format: str, columns: Columns) -> Callable[[Any], Example]:
    """The function from a row of this format to an example; it raises FormatError with what is wrong in the row."""
    convert = {
        "text": _text,
        "prompt-completion": _prompt_completion,
        "messages": _messages,
        "alpaca": _alpaca,
        "sharegpt": _sharegpt,
        "classification": _classification,
        "tokens": _tokens,
    }[format]

    def checked(row: Any) -> Example:
        if not isinstance(row, dict):
            raise FormatError(f"holds a {type(row).__name__}; an object with named columns was wanted")
        named = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
        wanted = COLUMNS[format]
        missing = [columns.get(name, name) for name in wanted if name[0] != "[" and named.get(name) is None]
        if missing:
            raise FormatError(f"no {' and no '.join(map(repr, missing))}; it has {_list(row)}")
        return convert(named)

    return checked


def answers(messages: list[dict[str, str]], turns: str) -> list[Example]:
    """A prompt and completion for each answer of the assistant, or for the last one only.

    Each prompt is the conversation up to that answer, which is what the model sees when it gives it; masking one
    long sequence instead would need a chat template that marks the answers, and few do.
    """
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    ends = ends if turns == "all" else ends[-1:]
    return [{"prompt": messages[:i], "completion": [messages[i]]} for i in ends]


def _text(row: dict[str, Any]) -> Example:
    return {"text": _string(row, "text")}


def _prompt_completion(row: dict[str, Any]) -> Example:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return {"messages": _conversation([*row["prompt"], *row["completion"]], "role", "content")}
    return {"prompt": _string(row, "prompt"), "completion": _string(row, "completion")}


def _messages(row: dict[str, Any]) -> Example:
    return {"messages": _conversation(row["messages"], "role", "content")}


def _sharegpt(row: dict[str, Any]) -> Example:
    turns = row["conversations"]
    by_role = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    return {"messages": _conversation(turns, *(("role", "content") if by_role else ("from", "value")))}


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


def _tokens(row: dict[str, Any]) -> Example:
    ids = row["input_ids"]
    if hasattr(ids, "dtype"):  # an array, of integers
        if ids.size and not 0 <= ids.min() <= ids.max() < MAX_ID:
            raise FormatError(f"'input_ids' go from {ids.min()} to {ids.max()}; token ids were wanted")
        return {"input_ids": ids}
    if not isinstance(ids, list) or not ids:
        raise FormatError(f"'input_ids' is {_kind(ids)}; a list of token ids was wanted")
    strange = [id for id in ids if type(id) is not int or not 0 <= id < MAX_ID]
    if strange:
        raise FormatError(f"'input_ids' holds {strange[0]!r}; token ids were wanted")
    for name in MASKS:
        mask = row.get(name)
        if mask is not None and (mask != ids if name == "labels" else not all(mask)):
            raise FormatError(f"{name!r} leaves tokens out, but every token of 'input_ids' is learned; use prompts")
    return {"input_ids": ids}


def _conversation(turns: Any, role_key: str, content_key: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"the conversation is {_kind(turns)}; a list of turns was wanted")
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
    return messages


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


def _list(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
