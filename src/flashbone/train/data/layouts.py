"""The table of layouts: which columns each kind of row has, what is learned of it, and the example that it becomes.

An example is one of
    {"text"}                    every token is learned
    {"prompt", "completion"}    the completion is learned, as in TRL's prompt-completion data
    {"conversation"}            JSON text: "messages" as the chat template sees them, "learned" (a truth for each
                                message), and "tools" and "chat_template_kwargs" where a row has them
    {"text", "label"}           classification
    {"input_ids"}               token ids: every one is learned
    {"question", "answer"}      the model's answer is compared with this one
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashbone.errors import FormatError
from flashbone.train.data.conversations import conversation, is_blank, kind
from flashbone.train.data.marks import MASKS

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

UNLABELLED = (-1, -100)  # what datasets writes for a class that is not known, and what losses ignore
MAX_ID = 2**31  # what datasets stores token ids in

Row = dict[str, Any]
Example = dict[str, Any]


class Unlabelled(FormatError):
    """A row without a class."""


@dataclass(frozen=True)
class RowFormat:
    """A layout of rows.

    Attributes:
        convert: Makes an example of a row that has the needed columns; raises FormatError with what is wrong.
        needed: Columns without which a row is not of this format.
        optional: Columns that are used where they exist.
        learned: What is learned of a row, in words.
        task: The task whose rows have this format: sft, classification or exact_match.
        has_prompt: A template may go around the example's prompt.
        turns: Columns that may hold the turns of a conversation.
        is_tokenised: Its examples are documents of token ids, which are cut into windows.
    """

    convert: Callable[[Row], Example]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    learned: str = ""
    task: str = "sft"
    has_prompt: bool = False
    turns: tuple[str, ...] = ()
    is_tokenised: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return self.needed + self.optional


def text_of(row: Row, name: str) -> str:
    """The text in a column; FormatError if it is none."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{name!r} is {kind(value)}; text was wanted")
    return value


def _optional(row: Row, name: str) -> str | None:
    return None if is_blank(row.get(name)) else text_of(row, name)


def _joined(row: Row, names: tuple[str, ...], needed: str) -> str:
    """The texts of these columns with a blank line between; but for one they may be missing."""
    texts = [text_of(row, name) if name == needed else _optional(row, name) for name in names]
    return "\n\n".join(text for text in texts if text is not None)


def _pair(prompt: str, completion: str, before: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> RowFormat:
    """Rows of a prompt and its completion, with more texts before and after the prompt."""

    def convert(row: Row) -> Example:
        return {"prompt": _joined(row, (*before, prompt, *after), prompt), "completion": text_of(row, completion)}

    return RowFormat(convert, (prompt, completion), (*before, *after), f"the {completion}", has_prompt=True)


def _text(row: Row) -> Example:
    return {"text": text_of(row, "text")}


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion], len(prompt) or 1, **_along(row))
    if names := [name for name in ("system", "tools", "chat_template_kwargs") if not is_blank(row.get(name))]:
        raise FormatError(f"{' and '.join(map(repr, names))} needs a prompt and a completion that are lists of turns")
    return {"prompt": text_of(row, "prompt"), "completion": text_of(row, "completion")}


def _along(row: Row) -> dict[str, Any]:
    tools = row.get("tools")
    if is_blank(tools) and not is_blank(row.get("functions")):  # OpenAI's older name, without the wrapping
        tools = [{"type": "function", "function": function} for function in row["functions"]]
    return {"system": row.get("system"), "tools": tools, "kwargs": row.get("chat_template_kwargs")}


def _messages(row: Row) -> Example:
    return conversation(row["messages"], **_along(row))


def _sharegpt(row: Row) -> Example:
    return conversation(row["conversations"], **_along(row))


def _alpaca(row: Row) -> Example:
    instruction, output, extra = text_of(row, "instruction"), text_of(row, "output"), _optional(row, "input")
    template = ALPACA if extra is None else ALPACA_WITH_INPUT
    preamble, _, turn = template.partition("\n\n")
    earlier = "".join(
        f"### Instruction:\n{asked}\n\n### Response:{answered}\n\n" for asked, answered in _history(row.get("history"))
    )
    prompt = f"{_optional(row, 'system') or preamble}\n\n{earlier}"
    return {"prompt": prompt + turn.format(instruction=instruction, input=extra), "completion": output}


def _history(history: Any) -> list[list[str]]:
    if is_blank(history):
        return []
    if not isinstance(history, list) or not all(map(_is_exchange, history)):
        raise FormatError(f"'history' is {kind(history)}; a list of pairs [instruction, output] was wanted")
    return history


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _classification(row: Row) -> Example:
    label = row.get("label")
    if _is_unlabelled(label):
        raise Unlabelled(
            f"'label' is {label!r}, which marks a row without a class; "
            "name its class, or leave such rows out of training with data.drop_unlabelled: true"
        )
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise FormatError(f"'label' is {kind(label)}; a name or a whole number was wanted")
    return {"text": text_of(row, "text"), "label": str(label)}


def _is_unlabelled(label: Any) -> bool:
    if is_blank(label):
        return True
    try:
        number = float(label)
    except (ValueError, TypeError, OverflowError):
        return False
    return number != number or number in UNLABELLED


def _questions(row: Row) -> Example:
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise FormatError(f"'answer' is {kind(answer)}; text or a number was wanted")
    return {"question": _joined(row, ("context", "question"), "question"), "answer": str(answer)}


def _tokens(row: Row) -> Example:
    ids = row["input_ids"]
    if hasattr(ids, "dtype"):  # an array of integers
        if ids.size and not 0 <= ids.min() <= ids.max() < MAX_ID:
            raise FormatError(f"'input_ids' go from {ids.min()} to {ids.max()}; token ids were wanted")
        return {"input_ids": ids}
    if not isinstance(ids, list) or not ids:
        raise FormatError(f"'input_ids' is {kind(ids)}; a list of token ids was wanted")
    wrong = [id for id in ids if type(id) is not int or not 0 <= id < MAX_ID]
    if wrong:
        raise FormatError(f"'input_ids' holds {wrong[0]!r}; token ids were wanted")
    for name in MASKS:
        mask = row.get(name)
        if mask is not None and (mask != ids if name == "labels" else not (isinstance(mask, list) and all(mask))):
            raise FormatError(f"{name!r} leaves tokens out, but every token of 'input_ids' is learned; use prompts")
    return {"input_ids": ids}


_ALONG = ("system", "tools", "functions", "chat_template_kwargs")
_ANSWERS = "the assistant's answers"

# The table. The first format of a task whose columns exist is taken in `auto`.
FORMATS = {
    "messages": RowFormat(_messages, ("messages",), _ALONG, _ANSWERS, turns=("messages",)),
    "sharegpt": RowFormat(_sharegpt, ("conversations",), _ALONG, _ANSWERS, turns=("conversations",)),
    "alpaca": RowFormat(
        _alpaca, ("instruction", "output"), ("input", "history", "system"), "the output", has_prompt=True
    ),
    "prompt-completion": RowFormat(
        _prompt_completion,
        ("prompt", "completion"),
        _ALONG,
        "the completion",
        has_prompt=True,
        turns=("prompt", "completion"),
    ),
    "text": RowFormat(_text, ("text",), learned="every token"),
    "tokens": RowFormat(_tokens, ("input_ids",), MASKS, "every token", is_tokenised=True),
    "query-response": _pair("query", "response", before=("context",), after=("input",)),
    "question-answer": _pair("question", "answer", before=("context",), after=("input",)),
    "prompt-response": _pair("prompt", "response", before=("context",), after=("input",)),
    "instruction-response": _pair("instruction", "response", after=("input", "context")),
    "classification": RowFormat(_classification, ("text", "label"), learned="the label", task="classification"),
    "questions": RowFormat(
        _questions, ("question", "answer"), ("context",), "nothing: answers are compared", task="exact_match"
    ),
}
