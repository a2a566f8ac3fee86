"""The table of layouts: which columns each kind of row has, and what is learned of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from flashbone.train.data import images, makers, preferences
from flashbone.train.data.makers import Example, Row
from flashbone.train.data.marks import MASKS, THOUGHTS

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

_PROMPT = ("question", "instruction", "query", "context", "conversation", "conversations", "messages")
PREFERRED = {
    **SYSTEM,
    "prompt": _PROMPT,
    "chosen": ("chosen_response", "chosen_answer", "preferred_output", "preferred", "accepted", "better"),
    "rejected": ("rejected_response", "rejected_answer", "non_preferred_output", "dispreferred", "worse"),
    "response_1": ("response1",),
    "response_2": ("response2",),
    "preference_strength": ("overall_preference",),
}
ASKED = {
    **SYSTEM,
    "prompt": (*_PROMPT, "problem"),
    "answer": ("solution", "completion", "response", "output", "target", "ground_truth", "final_answer"),
}
WANTED = {
    **SYSTEM,
    "prompt": _PROMPT,
    "completion": ("response", "answer", "output", "generation"),
    "messages": ("conversation", "conversations"),
    "label": ("labels", "kto_tag", "thumbs", "feedback", "rating", "is_good", "desirable", "liked"),
}


@dataclass(frozen=True)
class RowFormat:
    """A layout of rows.

    Attributes:
        convert: Makes an example of a row that has the needed columns; raises FormatError with what is wrong.
        needed: Columns without which a row is not of this format.
        optional: Columns that are used where they exist.
        learned: What is learned of a row, in words.
        tasks: The tasks whose rows have this format: those of a recipe, or exact_match.
        has_prompt: A template may go around the example's prompt.
        turns: Columns that may hold the turns of a conversation.
        names: Other names of its columns, which are read where only one of them exists.
        is_tokenised: Its examples are documents of token ids, which are cut into windows.
    """

    convert: Callable[[Row], Example]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    learned: str = ""
    tasks: tuple[str, ...] = ("sft",)
    has_prompt: bool = False
    turns: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_tokenised: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return self.needed + self.optional


ALONG = ("system", "tools", "functions", "chat_template_kwargs")


def _preference(
    convert: Callable[[Row], Example],
    needed: tuple[str, ...],
    learned: str = "chosen, rather than rejected",
    optional: tuple[str, ...] = ("prompt", "input", *ALONG),
    tasks: tuple[str, ...] = ("dpo", "reward"),
) -> RowFormat:
    """Rows of two answers, of which one is better; or, for kto, of one that is wanted or not."""
    names = WANTED if tasks == ("kto",) else PREFERRED
    return RowFormat(convert, needed, optional, learned, tasks, has_prompt=True, turns=needed[:2], names=names)


def _pair(
    prompt: str,
    completion: str,
    before: tuple[str, ...] = ("context",),
    after: tuple[str, ...] = ("input",),
    names: Mapping[str, tuple[str, ...]] = SYSTEM,
) -> RowFormat:
    """Rows of a prompt and its completion, with more texts before and after the prompt; or of a question and its
    answer with what the model thinks between them."""
    before = ("system", *before)

    def convert(row: Row) -> Example:
        asked, answer = makers.joined(row, (*before, prompt, *after), prompt), makers.text_of(row, completion)
        if "reasoning" in row:
            return makers.thought(asked, row["reasoning"], answer)
        return {"prompt": asked, "completion": answer}

    optional, learned = (*before, *after, "reasoning"), f"the {completion}"
    return RowFormat(
        convert, (prompt, completion), optional, learned, has_prompt=True, names={"reasoning": THOUGHTS, **names}
    )


_ANSWERS = "the assistant's answers"

# The table. The first format of a task whose columns exist is taken in `auto`.
FORMATS = {
    "images": RowFormat(
        images.convert,
        ("messages", "images"),
        ("system", "chat_template_kwargs"),
        _ANSWERS,
        turns=("messages",),
        names={**SYSTEM, "images": ("image",), "messages": ("conversations", "conversation")},
    ),
    "messages": RowFormat(
        makers.messages,
        ("messages",),
        ALONG,
        _ANSWERS,
        turns=("messages",),
        names={**SYSTEM, "messages": ("conversation", "dialog", "dialogue", "chat", "items", "contents", "data")},
    ),
    "sharegpt": RowFormat(makers.sharegpt, ("conversations",), ALONG, _ANSWERS, turns=("conversations",), names=SYSTEM),
    "alpaca": RowFormat(
        makers.alpaca,
        ("instruction", "output"),
        ("input", "history", "system"),
        "the output",
        has_prompt=True,
        names=SYSTEM,
    ),
    "prompt-completion": RowFormat(
        makers.prompt_completion,
        ("prompt", "completion"),
        ALONG,
        "the completion",
        has_prompt=True,
        turns=("prompt", "completion"),
        names=SYSTEM,
    ),
    "text": RowFormat(makers.text, ("text",), learned="every token"),
    "rwkv": RowFormat(makers.rwkv, ("text",), learned=_ANSWERS),
    "tokens": RowFormat(makers.tokens, ("input_ids",), MASKS, "every token", is_tokenised=True),
    "query-response": _pair("query", "response"),
    "query-answers": RowFormat(makers.calls, ("query", "answers", "tools"), ("system",), "the answers: calls of tools"),
    "question-response": _pair("question", "response"),
    "question-answer": _pair("question", "answer"),
    "question-answers": RowFormat(
        makers.squad,
        ("question", "answers"),
        ("system", "context"),
        "the first of the answers",
        has_prompt=True,
        names=SYSTEM,
    ),
    "question-attempt": RowFormat(
        makers.thought_answer,
        ("question", "thinking_trajectories", "attempt"),
        ("system",),
        "the thoughts and the attempt",
        names={
            **SYSTEM,
            "thinking_trajectories": ("deepseek_thinking_trajectory", "gemini_thinking_trajectory"),
            "attempt": ("deepseek_attempt", "gemini_attempt"),
        },
    ),
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
    "document-summary": _pair(
        "document",
        "summary",
        before=(),
        after=(),
        names={"document": ("article", "dialogue", "report"), "summary": ("highlights", "abstract")},
    ),
    "system-chat": RowFormat(makers.chat, ("chat", "system"), (), "the assistant's answers"),
    "pair-classification": RowFormat(
        makers.pair_classification,
        ("text", "text_pair", "label"),
        learned="the label",
        tasks=("classification",),
        names=PAIRED,
    ),
    "classification": RowFormat(
        makers.classification, ("text", "label"), learned="the label", tasks=("classification",), names=CLASSIFIED
    ),
    "preference": _preference(preferences.pair, ("chosen", "rejected")),
    "messages-rejected_response": _preference(
        preferences.with_rejected,
        ("messages", "rejected_response"),
        "the last answer, rather than rejected_response",
        optional=ALONG,
    ),
    "responses-strength": _preference(
        preferences.compared("response_1", "response_2", "preference_strength", preferences.by_sign),
        ("response_1", "response_2", "preference_strength"),
        "the better response, rather than the other",
    ),
    "responses-better": _preference(
        preferences.compared("response_0", "response_1", "better_response_id", preferences.by_number),
        ("response_0", "response_1", "better_response_id"),
        "the better response, rather than the other",
    ),
    "conversations-winner": _preference(
        preferences.compared("conversation_a", "conversation_b", "winner", preferences.by_winner),
        ("conversation_a", "conversation_b", "winner"),
        "the winner, rather than the other",
        optional=ALONG,
    ),
    "completion-label": _preference(
        preferences.labelled,
        ("completion", "label"),
        "the completion if it is wanted, else the opposite",
        tasks=("kto",),
    ),
    "messages-label": _preference(
        partial(preferences.labelled, column="messages"),
        ("messages", "label"),
        "the last answer if it is wanted, else the opposite",
        tasks=("kto",),
        optional=ALONG,
    ),
    "prompt-answer": RowFormat(
        preferences.asked,
        ("prompt",),
        ("answer", "system", "input"),
        "its own answers, by their rewards",
        ("grpo",),
        has_prompt=True,
        turns=("prompt",),
        names=ASKED,
    ),
    "questions": RowFormat(
        makers.questions, ("question", "answer"), ("context",), "nothing: answers are compared", tasks=("exact_match",)
    ),
}
