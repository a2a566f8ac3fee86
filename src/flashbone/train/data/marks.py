"""Columns and keys that change what is learned, or what an answer depends on: refused where nothing reads them."""

from collections.abc import Collection
from typing import Any

from flashbone.errors import FormatError
from flashbone.train.data.conversations import FLAGS, ROLES, is_blank, kind

# Columns of tokenised data that can mark tokens as not learned.
MASKS = ("labels", "attention_mask", "completion_mask", "assistant_masks")
# Columns that are true where something is not learned.
LEAVE_OUT = (
    "masked", "is_masked", "ignore", "ignored", "skip", "skipped", "exclude", "excluded", "no_loss", "ignore_loss",
)  # fmt: skip
# Columns that leave rows or tokens out of what is learned, or weigh them.
MARKS = frozenset({
    "weight", "weights", "sample_weight", "loss_weight", "loss_weights", "loss_scale", "mask", "masks", "loss_mask",
    "train_mask", "label_mask", "labels_mask", "train_on_turn", "train_detail", "is_train", "is_trained", "trained",
    "should_train", "learnable", "compute_loss", "calculate_loss", *FLAGS, *MASKS, *LEAVE_OUT,
})  # fmt: skip
TURN_MARKS = MARKS - {"weight", *FLAGS}  # `conversations` reads these two kinds
# Columns that an answer depends on, where a row has one.
CONTEXT = (
    "context", "input", "system", "system_prompt", "system_message", "instructions", "persona", "history",
    "chat_history", "conversation_history", "dialog_history", "dialogue_history", "previous_turns", "tools",
    "available_tools", "tools_json", "functions", "available_functions", "documents", "document", "passage", "passages",
    "article", "paragraph", "background", "knowledge", "evidence", "references", "choices", "options", "endings",
)  # fmt: skip
# What a model thinks before it answers.
THOUGHTS = (
    "reasoning", "reasoning_content", "thinking", "thoughts", "complex_cot", "cot", "chain_of_thought", "rationale",
    "deepseek_reasoning", "reasoning_trace", "thinking_trajectories",
)  # fmt: skip
# Columns of what a text answers.
PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "system", "system_prompt", "history")
# Texts beside a text that is classified.
SECOND_TEXTS = ("text_pair", "hypothesis", "sentence2", "question2", "text2", "context", "aspect")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Columns beside a text that say that the text is not all, or not what is to be learned.
ANSWERS = ("answer", "answers", "code", "completion", "output", "response", "summary", "target", "targets")
_WHO = ("role", "from", "speaker")
_CHOSEN = (
    "are preferences: set task: dpo or reward; or learn one answer with task sft: data.columns: {prompt: prompt,"
    " completion: chosen}, or {messages: chosen} where it holds the whole conversation, or {text: chosen}"
)
# Columns of rows that no format of a task reads, and what to do.
_PAIRS = "are pairs: set task: dpo or reward; or write each as two rows of prompt, completion and label"
_MESSAGES = "are one message a row; a row is a conversation, {messages: [{role: ..., content: ...}, ...]}"
_MEASURED = "are preferences; a training of task dpo or reward measures them, as its held-out rows (data.eval)"
_SINGLE = "are single answers with a label: set task: kto"
REFUSED = {
    "sft": {
        ("chosen", "rejected"): _CHOSEN,
        ("preferred_output", "non_preferred_output"): _CHOSEN.replace("chosen", "preferred_output"),
        ("prompt", "completions"): "hold several completions; task sft learns one, as rows of prompt and completion",
        ("translation",): "hold languages side by side, and not which is learned; write rows of prompt and completion",
        ("choices",): "are multiple choice; write the choices into prompts, as rows of prompt and completion",
        ("role", "content"): _MESSAGES,
    },
    "kto": {("chosen", "rejected"): _PAIRS, ("preferred_output", "non_preferred_output"): _PAIRS},
    "dpo": {("completion", "label"): _SINGLE, ("messages", "label"): _SINGLE},
    "reward": {("completion", "label"): _SINGLE, ("messages", "label"): _SINGLE},
    "exact_match": {("chosen", "rejected"): _MEASURED},
    "classification": {
        ("chosen", "rejected"): _MEASURED,
        ("tokens",): "hold a label for each word; one of each text was wanted, as in {text: ..., label: ...}",
    },
}


def is_harmless(name: str, mark: Any) -> bool:
    """Whether a mark leaves everything as it is: null, 1 or true, or a list of such; `labels` that are a text.

    A `mask` that is a single value is refused: for some, true means learned, and for others left out.
    """
    if isinstance(mark, list):
        return all(is_harmless("labels" if name == "labels" else "masks", item) for item in mark)
    if name in LEAVE_OUT:
        return mark in (None, "", False, 0)
    if name == "mask":
        return mark in (None, "")
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
    """Refuse rows of which only the text would be learned: messages in rows of their own, and questions and answers
    whose other half is beside them. A text may repeat its prompt.

    Raises:
        FormatError: it is one.
    """
    _check_media(row, ("text",))
    who = [name for name in _WHO if isinstance(row.get(name), str) and row[name].lower() in ROLES]
    if who:
        raise FormatError(f"{who[0]!r} is {row[who[0]]!r}: the columns {_MESSAGES}")
    if answers := [name for name in (*ANSWERS, *THOUGHTS) if not is_blank(row.get(name))]:
        raise FormatError(
            f"'text' would be learned, and {answers[0]!r} left out; set data.columns: {{prompt: text, completion:"
            f" {answers[0]}}}, or {{text: text}} to learn the text alone"
        )
    asked = [name for name in PROMPTS if not is_blank(row.get(name)) and str(row[name]) not in str(row["text"])]
    if asked:
        raise FormatError(
            f"'text' would be learned, and {asked[0]!r} left out; set data.columns: {{prompt: {asked[0]}, completion:"
            " text}, or {text: text} to learn the text alone"
        )


def _check_media(row: dict[str, Any], read: Collection[str], more: str = "") -> None:
    if media := [name for name in MEDIA if name not in read and not is_blank(row.get(name))]:
        remedy = f"name what is learned in data.columns, which leaves it out{more.replace('%s', media[0])}"
        raise FormatError(f"{media[0]!r}: only text is read; {remedy}")


def check_second_text(row: dict[str, Any]) -> None:
    """Refuse rows of a class that depends on a text that nothing reads.

    Raises:
        FormatError: it is one.
    """
    if second := [name for name in SECOND_TEXTS if not is_blank(row.get(name))]:
        raise FormatError(
            f"the class may depend on {second[0]!r}, which would be left out; set data.columns: {{text: text,"
            f" text_pair: {second[0]}, label: label}}, or {{text: text, label: label}} to leave it out"
        )


def check_context(row: dict[str, Any], read: Collection[str], format: str, learns_texts: bool) -> None:
    """Refuse columns that are not read and that the answer may depend on, thoughts beside prompts and answers that are
    learned as texts, and answers that are marked as bad.

    Raises:
        FormatError: there is one.
    """
    _check_media(row, read, "" if "conversations" not in read else ", or {messages: conversations, images: %s}")
    unread = [name for name in CONTEXT if name not in read and not is_blank(row.get(name))]
    if unread:
        raise FormatError(
            f"format {format} does not read {', '.join(map(repr, unread))}, which the answer may depend on; give the "
            "rows as messages, or name what is learned in data.columns, which leaves the rest out"
        )
    if thoughts := [name for name in THOUGHTS if learns_texts and name not in read and not is_blank(row.get(name))]:
        raise FormatError(
            f"{thoughts[0]!r} would be left out; set data.columns: {{question: ..., reasoning: {thoughts[0]}, answer:"
            " ...} to learn it as what the model thinks, or {prompt: ..., completion: ...} to leave it out"
        )
    if row.get("label") is False and "label" not in read:
        raise FormatError(
            "'label' is false, which marks an answer that is not wanted (as in KTO's data), but it would be learned; "
            "leave such rows out"
        )
