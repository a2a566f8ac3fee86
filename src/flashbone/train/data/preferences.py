"""Rows of preferences: which of two answers to a prompt is better, or whether one answer is wanted.

An example is that of the better answer, as in `makers`, with "rejected": the other answer, as text or as JSON of a
conversation; or that of an answer, with "label": whether it is wanted.
"""

import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from flashbone.errors import FormatError
from flashbone.train.data.conversations import CONTENTS, ROLES, as_turns, conversation, is_blank, kind, packed
from flashbone.train.data.makers import Example, Row
from flashbone.train.data.marks import MEDIA

STAND_IN = "..."  # where a prompt has no answer
WANTED = (
    "true",
    "1",
    "yes",
    "up",
    "thumbs_up",
    "thumbsup",
    "thumbs up",
    "👍",
    "good",
    "desirable",
    "chosen",
    "positive",
)
UNWANTED = ("false", "0", "-1", "no", "down", "thumbs_down", "thumbsdown", "thumbs down", "👎", "bad", "undesirable")
UNWANTED += ("rejected", "negative")
HUMAN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
OF_HH = {"Human": "user", "Assistant": "assistant"}


class LeftOut(FormatError):
    """A row that says nothing about preferences; it is left out and counted."""


def pair(row: Row) -> Example:
    """The example of a row with `chosen` and `rejected`: answers, or whole conversations.

    Raises:
        LeftOut: one answer is no better than the other.
        FormatError: a column cannot be read, or would be lost.
    """
    sides = [_side(row, name) for name in ("chosen", "rejected")]
    if any(map(_says_nothing, sides)):
        raise LeftOut("an answer is blank")
    (better, worse) = _examples(row, sides, ("chosen", "rejected"))
    if "conversation" in better:
        talks = [example["conversation"] for example in (better, worse)]
        before = [talk["messages"][:-1] for talk in talks]
        if before[0] != before[1]:
            raise LeftOut("chosen and rejected answer different prompts")
        if talks[0] == talks[1]:
            raise LeftOut("chosen and rejected are the same")
        return {**better, "rejected": packed(worse, "last")["conversation"]}
    if better == worse:
        raise LeftOut("chosen and rejected are the same")
    return {**better, "rejected": worse["completion"]}


def labelled(row: Row, column: str = "completion") -> Example:
    """The example of a row with an answer, or a conversation that ends in one, and a label.

    Raises:
        FormatError: a column cannot be read, or would be lost.
    """
    is_wanted = _truth(row["label"])
    side = _side(row, column)
    if _says_nothing(side):
        raise LeftOut("the answer is blank")
    (example,) = _examples(row, [side], (column,))
    return {**example, "label": is_wanted}


def compared(first: str, second: str, verdict: str, is_first: Callable[[Any], bool | None]) -> Callable[[Row], Example]:
    """The converter of rows that hold two answers, and which of them is better.

    Args:
        first: The column of an answer.
        second: That of the other.
        verdict: The column that says which is better.
        is_first: Whether its value means the first; None where neither is better.
    """

    def convert(row: Row) -> Example:
        answer = is_first(row[verdict])
        if answer is None:
            raise LeftOut(f"{verdict} prefers neither answer")
        better, worse = (first, second) if answer else (second, first)
        return pair({**row, "chosen": row[better], "rejected": row[worse]})

    return convert


def by_sign(strength: Any) -> bool | None:
    """HelpSteer's strengths: below 0 the first answer is better, above it the second."""
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise FormatError(f"the strength of the preference is {kind(strength)}; a number was wanted")
    return None if strength == 0 else strength < 0


def by_number(better: Any) -> bool | None:
    """The number of the better answer, from 0."""
    if better not in (0, 1, "0", "1"):
        raise FormatError(f"the better answer is {kind(better)}; 0 or 1 was wanted")
    return int(better) == 0


def by_winner(winner: Any) -> bool | None:
    """`model_a` or `model_b`, as in the chatbot arenas; anything with `tie` in it is none."""
    name = str(winner).strip().lower().removeprefix("model_")
    if name not in ("a", "b") and "tie" not in name:
        raise FormatError(f"the winner is {kind(winner)}; model_a, model_b or tie was wanted")
    return None if "tie" in name else name == "a"


def with_rejected(row: Row) -> Example:
    """The example of a conversation whose last answer is the better one."""
    turns = _side(row, "messages")
    rejected = _side(row, "rejected_response")
    if not isinstance(turns, list) or len(turns) < 2:
        raise FormatError(f"'messages' is {kind(row['messages'])}; a list of turns was wanted")
    worse = rejected if isinstance(rejected, list) else [{"role": "assistant", "content": rejected}]
    return pair({**row, "chosen": turns, "rejected": worse if len(worse) > 1 else [*turns[:-1], *worse]})


def asked(row: Row) -> Example:
    """The example of a row with a prompt, to which the model gives answers of its own, and the right one if it has one.

    Raises:
        FormatError: a column cannot be read, or would be lost.
    """
    prompt, answer = as_turns(row["prompt"]) if not isinstance(row["prompt"], str) else row["prompt"], row.get("answer")
    if isinstance(prompt, list) and is_blank(answer) and len(prompt) > 1 and _is_answer(prompt[-1]):
        *prompt, last = prompt
        answer = next((last[name] for name in CONTENTS if name in last), None)
    if not isinstance(answer, str | int | float | None):
        raise FormatError(f"'answer' is {kind(answer)}; text or a number was wanted")
    text = "" if is_blank(answer) else str(answer)
    (example,) = _examples({**row, "prompt": prompt}, [text or STAND_IN], ("answer",))
    for message in example["conversation"]["messages"] if "conversation" in example else ():
        if more := message.keys() - {"role", "content"}:
            raise FormatError(f"a turn has {', '.join(sorted(more))}, which task grpo does not read")
    return {**example, "answer": text}


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, dict) and ROLES.get(str(turn.get("role", turn.get("from"))).lower()) == "assistant"


def rejected(example: Example) -> Example:
    """The example of the answer that an example of two rejects."""
    name = "conversation" if "conversation" in example else "completion"
    return {**{key: value for key, value in example.items() if key == "prompt"}, name: example["rejected"]}


def _side(row: Row, name: str) -> Any:
    """An answer as text, or the turns that end in it."""
    value = row[name]
    if isinstance(value, str):
        if value.lstrip().startswith(("[{", '{"')):
            turns = as_turns(value)
            return [turns] if isinstance(turns, dict) else turns
        start, *parts = HUMAN.split(value)
        if parts and not start.strip() and parts[0] == "Human":
            return [
                {"role": OF_HH[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
            ]
        return value
    value = as_turns(value)
    return [value] if isinstance(value, dict) else value


def _says_nothing(side: Any) -> bool:
    turn = side[-1] if isinstance(side, list) and side else side
    if not isinstance(turn, dict):
        return is_blank(turn)
    said = next((turn[name] for name in CONTENTS if name in turn), None)
    return is_blank(said) and is_blank(turn.get("tool_calls")) and is_blank(turn.get("function_call"))


def _examples(row: Row, sides: list[Any], names: tuple[str, ...]) -> list[Example]:
    """An example for each of the answers to the row's prompt."""
    if media := [name for name in MEDIA if not is_blank(row.get(name))]:
        raise FormatError(f"{' and '.join(map(repr, media))}: only text is read; take the column out, or such rows")
    prompt, extra, tools = row.get("prompt"), row.get("input"), row.get("tools")
    if is_blank(prompt):
        prompt, extra = extra, None
    if isinstance(prompt, dict) and "messages" in prompt:  # OpenAI's `input`
        prompt, tools = prompt["messages"], prompt.get("tools", tools)
    if not isinstance(prompt, str):
        prompt = as_turns(prompt)
    system, is_text = row.get("system"), is_blank(prompt) or isinstance(prompt, str)
    if is_text and all(isinstance(side, str) for side in sides):
        lost = {
            "tools": tools,
            "functions": row.get("functions"),
            "chat_template_kwargs": row.get("chat_template_kwargs"),
        }
        if names := tuple(name for name, value in lost.items() if not is_blank(value)):
            raise FormatError(f"{' and '.join(map(repr, names))} needs a prompt or answers that are lists of turns")
        return _texts(system, prompt, extra, sides)
    if not is_blank(extra):
        raise FormatError("'input' needs a prompt and answers that are texts; put it into the turns")
    if is_blank(tools) and not is_blank(row.get("functions")):
        tools = [{"type": "function", "function": function} for function in row["functions"]]
    along = {"system": system, "tools": tools, "kwargs": row.get("chat_template_kwargs")}
    return [_talk(prompt, side, along, name) for side, name in zip(sides, names, strict=True)]


def _texts(system: Any, prompt: Any, extra: Any, sides: list[str]) -> list[Example]:
    parts = [part for part in (system, prompt, extra) if not is_blank(part)]
    if wrong := [part for part in parts if not isinstance(part, str)]:
        raise FormatError(f"a part of the prompt is {kind(wrong[0])}; text was wanted")
    if not is_blank(prompt):
        if all(side.startswith(prompt) for side in sides):  # each repeats it
            sides = [side.removeprefix(prompt) for side in sides]
        return [{"prompt": "\n\n".join(parts), "completion": side} for side in sides]
    if parts or len(sides) < 2:
        raise FormatError("there is no prompt; name its column, as in data.columns: {prompt: question}")
    shared = _shared_words(*sides)
    if sides[0] != sides[1] and not shared:
        raise FormatError(
            "there is no prompt, and chosen and rejected do not begin with one; name its column, as in data.columns:"
            " {prompt: question}"
        )
    return [{"prompt": shared, "completion": side.removeprefix(shared)} for side in sides]


def _shared_words(one: str, other: str) -> str:
    """The words that both texts begin with, without the space after them."""
    same = "".join(a for a, _ in takewhile(lambda letters: letters[0] == letters[1], zip(one, other, strict=False)))
    if same[-1:].isspace():
        return same.rstrip()
    words = same.rsplit(maxsplit=1)
    return words[0] if len(words) == 2 else ""


def _talk(prompt: Any, side: Any, along: dict[str, Any], name: str) -> Example:
    """The conversation of a prompt and an answer, of which only the last turn is learned."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    before = [] if is_blank(before) else before
    after = side if isinstance(side, list) else [{"role": "assistant", "content": side}]
    if not isinstance(before, list):
        raise FormatError(f"'prompt' is {kind(prompt)}; a text or a list of turns was wanted")
    is_whole = len(after) > 1
    turns = after if is_whole else [*before, *after]
    talk = conversation(turns, max(1, len(turns) - 1), **along)
    if is_whole and before:
        said = [message["content"].strip() for message in talk["conversation"]["messages"][:-1]]
        asked = [turn.get(key) for turn in before for key in CONTENTS if isinstance(turn, dict) and key in turn]
        if lost := [text for text in asked if not isinstance(text, str) or text.strip() not in said]:
            raise FormatError(f"{name!r} is a conversation without the prompt {kind(lost[0])}; leave one of them out")
    return talk


def _truth(label: Any) -> bool:
    """Whether a label means that the answer is wanted."""
    word = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip().lower()
    if word in WANTED:
        return True
    if word in UNWANTED:
        return False
    raise FormatError(f"'label' is {kind(label)}; true or false, 1 or 0, or thumbs_up or thumbs_down was wanted")
