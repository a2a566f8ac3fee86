"""Columns and keys that change what is learned, or what an answer depends on: refused where nothing reads them."""

from collections.abc import Collection
from typing import Any

from flashbone.errors import FormatError
from flashbone.train.data.conversations import FLAGS, ROLES, is_blank, kind

# Columns of tokenised data that can mark tokens as not learned.
MASKS = ("labels", "attention_mask", "completion_mask", "assistant_masks")
# Columns that leave rows or tokens out of what is learned, or weigh them.
MARKS = frozenset({
    "weight", "weights", "sample_weight", "loss_weight", "loss_weights", "loss_scale", "mask", "masks", "loss_mask",
    "train_mask", "label_mask", "labels_mask", "train_on_turn", "train_detail", *FLAGS, *MASKS,
})  # fmt: skip
TURN_MARKS = MARKS - {"weight", *FLAGS}  # `conversations` reads these two kinds
# Columns that an answer depends on, where a row has one.
CONTEXT = (
    "context", "input", "system", "system_prompt", "system_message", "history", "chat_history", "tools", "functions",
    "documents", "passage",
)  # fmt: skip
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Columns beside a text that say that the text is not all, or not what is to be learned.
ANSWERS = ("answer", "answers", "code", "completion", "output", "response", "summary", "target", "targets")
_WHO = ("role", "from", "speaker")
_CHOSEN = (
    "are preferences: set task: dpo or reward; or learn one answer with task sft: data.columns: {prompt: prompt,"
    " completion: chosen}, or {messages: chosen} where it holds the whole conversation, or {text: chosen}"
)
# Columns of rows that no format reads, and what to do.
REFUSED = {
    ("chosen", "rejected"): _CHOSEN,
    ("preferred_output", "non_preferred_output"): _CHOSEN.replace("chosen", "preferred_output"),
    ("prompt", "completions"): "hold several completions; task sft learns one, as rows of prompt and completion",
    ("role", "content"): "are one message a row; a row is a conversation, {messages: [{role: ..., content: ...}, ...]}",
}


def is_harmless(name: str, mark: Any) -> bool:
    """Whether a mark leaves everything as it is: null, 1 or true, or a list of such; `labels` that are a text."""
    if isinstance(mark, list):
        return all(is_harmless(name, item) for item in mark)
    return mark in (None, True, 1, "") or (name == "labels" and isinstance(mark, str))


def check_marks(row: dict[str, Any], read: Collection[str], turns: Collection[str]) -> None:
    """Refuse marks that nothing reads.

    Args:
        row: A row.
        read: Its columns that are read.
        turns: Those that may hold the turns of a conversation.

    Raises:
        FormatError: there is one.
    """
    for name in row.keys() & MARKS:
        if name not in read and not is_harmless(name, row[name]):
            raise FormatError(
                f"{name!r} is {kind(row[name])}, which would change what is learned, but no format reads it; "
                "leave out turns of conversations with weight: 0 or train: false, or take the column out"
            )
    for column in turns:
        listed = row.get(column)
        for number, turn in enumerate(listed if isinstance(listed, list) else (), 1):
            for name in turn.keys() & TURN_MARKS if isinstance(turn, dict) else ():
                if not is_harmless(name, turn[name]):
                    raise FormatError(
                        f"turn {number}: {name!r} is {kind(turn[name])}, which would change what is learned, but "
                        "nothing reads it; weight: 0 or train: false leave a turn out"
                    )


def check_text(row: dict[str, Any]) -> None:
    """Refuse rows of which only the text would be learned: messages in rows of their own, and questions beside their
    answers.

    Raises:
        FormatError: it is one.
    """
    who = [name for name in _WHO if isinstance(row.get(name), str) and row[name].lower() in ROLES]
    if who:
        raise FormatError(f"{who[0]!r} is {row[who[0]]!r}: the columns {REFUSED['role', 'content']}")
    if answers := [name for name in ANSWERS if not is_blank(row.get(name))]:
        raise FormatError(
            f"'text' would be learned, and {answers[0]!r} left out; set data.columns: {{prompt: text, completion:"
            f" {answers[0]}}}, or {{text: text}} to learn the text alone"
        )


def check_context(row: dict[str, Any], read: Collection[str], format: str) -> None:
    """Refuse columns that are not read and that the answer may depend on, and answers that are marked as bad.

    Raises:
        FormatError: there is one.
    """
    if media := [name for name in MEDIA if name not in read and not is_blank(row.get(name))]:
        raise FormatError(f"{media[0]!r}: only text is read; name what is learned in data.columns, which leaves it out")
    unread = [name for name in CONTEXT if name not in read and not is_blank(row.get(name))]
    if unread:
        raise FormatError(
            f"format {format} does not read {', '.join(map(repr, unread))}, which the answer may depend on; give the "
            "rows as messages, or name what is learned in data.columns, which leaves the rest out"
        )
    if row.get("label") is False and "label" not in read:
        raise FormatError(
            "'label' is false, which marks an answer that is not wanted (as in KTO's data), but it would be learned; "
            "leave such rows out"
        )
