"""The table of layouts: which columns each kind of row has, what is learned of it, and the example that it becomes.

An example is one of
    {"text"}                    every token is learned
    {"prompt", "completion"}    the completion is learned, as in TRL's prompt-completion data
    {"conversation"}            JSON text: "messages" as the chat template sees them, "learned" (a truth for each
                                message), and "tools" and "chat_template_kwargs" where a row has them
    {"text", "label"}           classification; {"text_pair"}, too, where two texts are compared
    {"input_ids"}               token ids: every one is learned
    {"question", "answer"}      the model's answer is compared with this one
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

# Other names of columns.
SYSTEM = {"system": ("system_prompt", "system_message", "system_instruction", "systeminstruction")}
_LABELS = ("labels", "category", "sentiment", "stars", "intent", "emotion", "class")
CLASSIFIED = {
    "text": ("sentence", "review", "content", "comment", "comment_text", "tweet", "utterance"),
    "label": _LABELS,
}
PAIRED = {
    "text": ("premise", "sentence1", "question1", "text1", "question"),
    "text_pair": ("hypothesis", "sentence2", "question2", "text2", "sentence", "passage"),
    "label": _LABELS,
}

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
        names: Other names of its columns, which are read where only one of them exists.
        is_tokenised: Its examples are documents of token ids, which are cut into windows.
    """

    convert: Callable[[Row], Example]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    learned: str = ""
    task: str = "sft"
    has_prompt: bool = False
    turns: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
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


def _pair(
    prompt: str, completion: str, before: tuple[str, ...] = ("context",), after: tuple[str, ...] = ("input",)
) -> RowFormat:
    """Rows of a prompt and its completion, with more texts before and after the prompt."""
    before = ("system", *before)

    def convert(row: Row) -> Example:
        return {"prompt": _joined(row, (*before, prompt, *after), prompt), "completion": text_of(row, completion)}

    optional = (*before, *after)
    return RowFormat(convert, (prompt, completion), optional, f"the {completion}", has_prompt=True, names=SYSTEM)


def _text(row: Row) -> Example:
    return {"text": text_of(row, "text")}


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):  # one may be a text
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": text_of(row, "prompt")}]
        if not isinstance(completion, list):
            completion = [{"role": "assistant", "content": text_of(row, "completion")}]
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
    if not isinstance(label, str | int):
        more = "; a text has one class here" if isinstance(label, list) else ""
        raise FormatError(f"'label' is {kind(label)}; a name or a whole number was wanted{more}")
    return {"text": text_of(row, "text"), "label": str(label).strip()}


def _pair_classification(row: Row) -> Example:
    return {**_classification(row), "text_pair": text_of(row, "text_pair")}


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


def _calls(row: Row) -> Example:
    turns = [{"role": "user", "content": row["query"]}, {"from": "tool_call", "value": row["answers"]}]
    return conversation(turns, **_along(row))


def _chat(row: Row) -> Example:
    chat = row["chat"]
    if not isinstance(chat, list):
        start, *parts = re.split(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ", text_of(row, "chat"))
        if start.strip() or not parts:
            raise FormatError(f"'chat' is {kind(chat)}; 'USER: ' and 'ASSISTANT: ' were wanted before what they say")
        said = [text.strip().removesuffix("<|endoftext|>").rstrip() for text in parts[1::2]]
        roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
        chat = [{"role": roles[name], "content": text} for name, text in zip(parts[::2], said, strict=True)]
    system = row.get("system")
    return conversation(chat, system=system.removeprefix("SYSTEM: ") if isinstance(system, str) else system)


_ALONG = ("system", "tools", "functions", "chat_template_kwargs")
_ANSWERS = "the assistant's answers"

# The table. The first format of a task whose columns exist is taken in `auto`.
FORMATS = {
    "messages": RowFormat(
        _messages,
        ("messages",),
        _ALONG,
        _ANSWERS,
        turns=("messages",),
        names={**SYSTEM, "messages": ("conversation", "dialog", "dialogue", "chat", "items", "contents", "data")},
    ),
    "sharegpt": RowFormat(_sharegpt, ("conversations",), _ALONG, _ANSWERS, turns=("conversations",), names=SYSTEM),
    "alpaca": RowFormat(
        _alpaca, ("instruction", "output"), ("input", "history", "system"), "the output", has_prompt=True, names=SYSTEM
    ),
    "prompt-completion": RowFormat(
        _prompt_completion,
        ("prompt", "completion"),
        _ALONG,
        "the completion",
        has_prompt=True,
        turns=("prompt", "completion"),
        names=SYSTEM,
    ),
    "text": RowFormat(_text, ("text",), learned="every token"),
    "tokens": RowFormat(_tokens, ("input_ids",), MASKS, "every token", is_tokenised=True),
    "query-response": _pair("query", "response"),
    "query-answers": RowFormat(_calls, ("query", "answers", "tools"), ("system",), "the answers: calls of tools"),
    "question-response": _pair("question", "response"),
    "question-answer": _pair("question", "answer"),
    "prompt-response": _pair("prompt", "response"),
    "instruction-response": _pair("instruction", "response", before=(), after=("input", "context")),
    "instruction-completion": _pair("instruction", "completion", before=(), after=("input", "context")),
    "instruction-answer": _pair("instruction", "answer", before=(), after=("input", "context")),
    "problem-solution": _pair("problem", "solution"),
    "problem-generated_solution": _pair("problem", "generated_solution"),
    "user-assistant": _pair("user", "assistant"),
    "human-assistant": _pair("human", "assistant"),
    "inputs-targets": _pair("inputs", "targets", before=("definition",), after=()),
    "input-output": _pair("input", "output", after=()),
    "system-chat": RowFormat(_chat, ("chat", "system"), (), "the assistant's answers"),
    "pair-classification": RowFormat(
        _pair_classification, ("text", "text_pair", "label"), learned="the label", task="classification", names=PAIRED
    ),
    "classification": RowFormat(
        _classification, ("text", "label"), learned="the label", task="classification", names=CLASSIFIED
    ),
    "questions": RowFormat(
        _questions, ("question", "answer"), ("context",), "nothing: answers are compared", task="exact_match"
    ),
}
