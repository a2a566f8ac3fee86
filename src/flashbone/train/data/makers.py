"""The examples that rows become, one function a layout.

An example is one of
    {"text"}                    every token is learned
    {"prompt", "completion"}    the completion is learned, as in TRL's prompt-completion data
    {"conversation"}            JSON text: "messages" as the chat template sees them, "learned" (a truth for each
                                message), and "tools" and "chat_template_kwargs" where a row has them
    {"conversation", "images"}  the same about images: path and bytes of each
    {"text", "label"}           classification; {"text_pair"}, too, where two texts are compared
    {"input_ids"}               token ids: every one is learned
    {"question", "answer"}      the model's answer is compared with this one
and with "rejected" or "label" one of preferences (`preferences`)
"""

import re
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

_SEVERAL = (
    "several classes of a text (multi-label), and one is learned; train a run for each class, on a column of"
    " yes and no, or with transformers' Trainer and problem_type multi_label_classification"
)
UNLABELLED = (-1, -100)  # what datasets writes for a class that is not known, and what losses ignore
MAX_ID = 2**31  # what datasets stores token ids in

Row = dict[str, Any]
Example = dict[str, Any]


class Unlabelled(FormatError):
    """A row without a class."""


def text_of(row: Row, name: str) -> str:
    """The text in a column; FormatError if it is none."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{name!r} is {kind(value)}; text was wanted")
    return value


def _optional(row: Row, name: str) -> str | None:
    return None if is_blank(row.get(name)) else text_of(row, name)


def joined(row: Row, names: tuple[str, ...], needed: str) -> str:
    """The texts of these columns with a blank line between; but for one they may be missing."""
    texts = [text_of(row, name) if name == needed else _optional(row, name) for name in names]
    return "\n\n".join(text for text in texts if text is not None)


def text(row: Row) -> Example:
    return {"text": text_of(row, "text")}


def prompt_completion(row: Row) -> Example:
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


def messages(row: Row) -> Example:
    return conversation(row["messages"], **_along(row))


def sharegpt(row: Row) -> Example:
    return conversation(row["conversations"], **_along(row))


def alpaca(row: Row) -> Example:
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


def classification(row: Row) -> Example:
    label = row.get("label")
    label = label[0] if isinstance(label, list) and len(label) == 1 else label
    if _is_unlabelled(label):
        raise Unlabelled(
            f"'label' is {label!r}, which marks a row without a class; "
            "name its class, or leave such rows out of training with data.drop_unlabelled: true"
        )
    if not isinstance(label, str | int):
        if isinstance(label, list):
            raise FormatError(f"'label' is {kind(label)}: {_SEVERAL}")
        raise FormatError(f"'label' is {kind(label)}; a name or a whole number was wanted")
    return {"text": text_of(row, "text"), "label": str(label).strip()}


def squad(row: Row) -> Example:
    answers = row["answers"]
    of_each = answers if isinstance(answers, list) else [answers]
    keys = {key for answer in of_each if isinstance(answer, dict) for key in answer}
    if unread := sorted(keys - {"text", "answer_start"}):
        raise FormatError(f"'answers' has {unread[0]!r}, which nothing reads; give the one to be learned as 'answer'")
    if isinstance(answers, dict):
        answers = answers.get("text")
    elif isinstance(answers, list):
        answers = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    if not isinstance(answers, list) or not answers:
        raise FormatError(f"'answers' is {kind(row['answers'])}; texts were wanted; leave questions without one out")
    prompt = joined(row, ("system", "context", "question"), "question")
    return {"prompt": prompt, "completion": text_of({"answers": answers[0]}, "answers")}


def thought_answer(row: Row) -> Example:
    return thought(text_of(row, "question"), row["thinking_trajectories"], text_of(row, "attempt"), row.get("system"))


def thought(asked: str, thoughts: Any, answer: str, system: Any = None) -> Example:
    """The conversation of a question, what the model thinks (texts; none where it is blank), and its answer."""
    parts = [] if is_blank(thoughts) else thoughts if isinstance(thoughts, list) else [thoughts]
    answered = {"role": "assistant", "content": answer}
    if parts:
        answered["reasoning_content"] = "\n".join(text_of({"reasoning": part}, "reasoning") for part in parts)
    return conversation([{"role": "user", "content": asked}, answered], system=system)


def pair_classification(row: Row) -> Example:
    return {**classification(row), "text_pair": text_of(row, "text_pair")}


def _is_unlabelled(label: Any) -> bool:
    if is_blank(label):
        return True
    try:
        number = float(label)
    except (ValueError, TypeError, OverflowError):
        return False
    return number != number or number in UNLABELLED


def questions(row: Row) -> Example:
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise FormatError(f"'answer' is {kind(answer)}; text or a number was wanted")
    return {"question": joined(row, ("context", "question"), "question"), "answer": str(answer)}


def tokens(row: Row) -> Example:
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


def calls(row: Row) -> Example:
    turns = [{"role": "user", "content": row["query"]}, {"from": "tool_call", "value": row["answers"]}]
    return conversation(turns, **_along(row))


def chat(row: Row) -> Example:
    chat = row["chat"]
    if not isinstance(chat, list):
        roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
        chat = _said(text_of(row, "chat"), roles)
    system = row.get("system")
    return conversation(chat, system=system.removeprefix("SYSTEM: ") if isinstance(system, str) else system)


def rwkv(row: Row) -> Example:
    return conversation(_said(text_of(row, "text"), {"System": "system", "User": "user", "Assistant": "assistant"}))


def _said(text: str, roles: dict[str, str]) -> list[dict[str, str]]:
    """The turns of a text, in which lines begin with a role's name and a colon."""
    start, *parts = re.split(rf"(?:^|\n)\s*({'|'.join(roles)}):", text)
    if start.strip() or not parts:
        raise FormatError(f"the text begins with {text[:40]!r}; {', '.join(f'{role}:' for role in roles)} were wanted")
    said = [part.strip().removesuffix("<|endoftext|>").rstrip() for part in parts[1::2]]
    return [{"role": roles[name], "content": content} for name, content in zip(parts[::2], said, strict=True)]
