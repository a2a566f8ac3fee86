"""From an example to what the model sees: token ids, and which of them are learned.

Training, held-out rows, evaluation and the dry run all go through `tokenise`, so they cannot differ.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from flashbone.errors import FormatError
from flashbone.train.data.conversations import REASONING
from flashbone.train.templates import in_time, rendered

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
IGNORED = -100  # the label of a token that is not learned
Example = dict[str, Any]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Tokens:
    """A row as the model sees it.

    Attributes:
        ids: the tokens.
        learned: for each, whether its prediction is learned; nothing predicts the first.
        ends: for each learned answer, the number of tokens up to its end.
    """

    ids: list[int]
    learned: list[bool]
    ends: list[int]

    @property
    def labels(self) -> list[int]:
        return [token if is_learned else IGNORED for token, is_learned in zip(self.ids, self.learned, strict=True)]

    def cut(self, length: int | None, keep_end: bool = False) -> "Tokens":
        """The first (or last) `length` tokens, with the ends of those answers that kept theirs."""
        if length is None or len(self.ids) <= length:
            return self
        if keep_end:
            gone = len(self.ids) - length
            return Tokens(self.ids[gone:], self.learned[gone:], [end - gone for end in self.ends if end > gone])
        return Tokens(self.ids[:length], self.learned[:length], [end for end in self.ends if end <= length])


def tokenise(example: Example, tokenizer: Any, learn_all: bool = False) -> list[Tokens]:
    """The rows of an example. A conversation is one row, or one row for each learned answer where the chat template
    changes earlier answers as it goes on, as models do that drop their earlier reasoning.

    Args:
        example: A text, a prompt with its completion, a conversation or token ids, as in `data.formats`.
        tokenizer: The model's.
        learn_all: Learn prompts, too.

    Raises:
        FormatError: the chat template refuses the conversation, or leaves a part of it out.
    """
    if "conversation" in example:
        rows = _conversation(Talk.read(example["conversation"], tokenizer))
    elif "prompt" in example:
        before = text_ids(tokenizer, example["prompt"])
        whole = text_ids(tokenizer, with_end(example["prompt"] + example["completion"], tokenizer))
        rows = [_from(len(_shared(before, whole)), whole)]
    elif "text" in example:
        rows = [_from(0, text_ids(tokenizer, with_end(example["text"], tokenizer)))]
    else:  # windows of documents, which need not end in a token of their own
        rows = [Tokens(list(example["input_ids"]), [True] * len(example["input_ids"]), [])]
    return [Tokens(row.ids, [True] * len(row.ids), row.ends) for row in rows] if learn_all else rows


def pieces(row: Tokens, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is learned."""
    ids: Iterator[int] = iter(row.ids)
    return [
        (tokenizer.decode([next(ids) for _ in same], clean_up_tokenization_spaces=False), is_learned)
        for is_learned, same in groupby(row.learned)
    ]


def bracketed(row: Tokens, tokenizer: Any) -> str:
    """The row's text with [[brackets]] around what is learned."""
    return "".join(f"[[{text}]]" if is_learned else text for text, is_learned in pieces(row, tokenizer))


def with_end(text: str, tokenizer: Any) -> str:
    """The text with the token that ends it, as TRL trains it."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without a second end token where the tokenizer adds its own."""
    ids, end = list(tokenizer(text)["input_ids"]), tokenizer.eos_token_id
    if end is not None and ids[-1:] == [end] and (ids[-2:-1] == [end] or not text.endswith(tokenizer.eos_token)):
        ids.pop()
    return ids


def has_names(example: Example) -> bool:
    """Whether messages of a conversation have a name of who speaks."""
    text = example.get("conversation", "")
    return '"name"' in text and any(m.get("name") and m["role"] != "tool" for m in json.loads(text)["messages"])


def writes_names(tokenizer: Any) -> bool:
    """Whether the chat template writes such a name; most do not."""
    messages = [{"role": "user", "content": "a", "name": "Zoe"}, {"role": "assistant", "content": "b"}]
    with contextlib.suppress(FormatError):
        return "Zoe" in Talk(messages, [False, True], tokenizer, {"tools": None}).written(messages)
    return True


def end_marks(tokenizer: Any) -> set[int]:
    """The special and added tokens, which may end an answer."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def end_token(row: Tokens, end: int, tokenizer: Any, marks: set[int]) -> int | None:
    """The token that ends an answer, apart from white space after it; None if none does.

    It is one of `end_marks`, such as `<|im_end|>`, or, as for RWKV's models, a blank line that occurs nowhere else in
    the answer.
    """
    start = end - len(list(takewhile(bool, reversed(row.learned[:end]))))
    answer = row.ids[start:end]
    for token in reversed(answer):
        if token in marks:
            return token
        if tokenizer.decode([token]).strip():
            break
    if answer and tokenizer.decode(answer[-1:]) == "\n\n" and answer.count(answer[-1]) == 1:
        return answer[-1]
    return None


@dataclass(frozen=True)
class Talk:
    """A conversation and the tokenizer whose chat template writes it."""

    messages: Messages
    learned: list[bool]
    tokenizer: Any
    kwargs: dict[str, Any]  # for the template: tools, and what the row gives it

    @classmethod
    def read(cls, text: str, tokenizer: Any) -> "Talk":
        content = json.loads(text)
        kwargs = {"tools": content.get("tools"), **(content.get("chat_template_kwargs") or {})}
        return cls(content["messages"], content["learned"], tokenizer, kwargs)

    def written(self, messages: Messages, answer_follows: bool = False) -> str:
        """These messages in the chat template.

        Raises:
            FormatError: it refuses them.
        """
        if not messages:
            return ""
        return rendered(self.tokenizer, messages, add_generation_prompt=answer_follows, **self.kwargs)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them

    def answer(self, number: int) -> tuple[Tokens, str]:
        """The conversation up to the answer of this number, with only that answer learned; and its text.

        Tokens are learned from where the whole differs from the prompt, which ends where the model has to answer.
        """
        so_far = self.messages[: number + 1]
        text = self.written(so_far)
        ids = self.ids(text)
        row = _from(len(_shared(self.ids(self.written(so_far[:-1], answer_follows=True)), ids)), ids)
        self._check(text, number)
        marks = self._marks(so_far)
        if marks is None:
            return row, text
        learned = [a and bool(b) for a, b in zip(row.learned, marks, strict=True)]
        return Tokens(
            ids, learned, [max((i + 1 for i, is_learned in enumerate(learned) if is_learned), default=0)]
        ), text

    def _marks(self, messages: Messages) -> list[int] | None:
        """Which tokens the template itself marks as the assistant's, by {% generation %}; None where it marks none."""
        template = self.tokenizer.get_chat_template(tools=self.kwargs["tools"])
        if not self.tokenizer.is_fast or not _MARKS.search(template):
            return None
        with in_time():
            return self.tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, **self.kwargs
            )["assistant_masks"]

    def _check(self, text: str, number: int) -> None:
        """Raise FormatError where the template leaves out what decides the answer."""
        answer = self.messages[number]
        wanted = [
            (message["role"] + "'s content", message.get("content"))
            for message in self.messages[:number]
            if message["role"] in ("system", "user")
        ]
        wanted += [(name, answer.get(name)) for name in REASONING]
        calls = [call.get("function", call) for call in answer.get("tool_calls") or ()]
        tools = [tool.get("function", tool) for tool in self.kwargs["tools"] or ()]
        wanted += [("tool_calls", call.get("name")) for call in calls] + [("tools", tool.get("name")) for tool in tools]
        for kind, part in wanted:
            if isinstance(part, str) and part.strip() not in text:
                raise FormatError(
                    f"the chat template leaves out the {kind} ({part.strip()[:40]!r}); leave it out of the row, or give"
                    " a template that writes it in training.chat_template_path"
                )


def _conversation(talk: Talk) -> list[Tokens]:
    """One row, if every learned answer and what precedes it have the same tokens there as in a row of their own."""
    answers = [talk.answer(number)[0] for number, is_learned in enumerate(talk.learned) if is_learned]
    if not answers:
        return []
    *before, last = answers
    learned, ends = list(last.learned), []
    for row in before:
        ids = row.ids
        if ids != last.ids[: len(ids)] and ids[-1] == talk.tokenizer.eos_token_id:
            ids = ids[:-1]  # some templates end every text with it, after an end of each answer
            shorter, marks = Tokens(ids, row.learned[:-1], []), end_marks(talk.tokenizer)
            if end_token(shorter, len(ids), talk.tokenizer, marks) is None:
                return answers
        if ids != last.ids[: len(ids)]:
            return answers
        learned[: len(ids)] = [a or b for a, b in zip(learned, row.learned[: len(ids)], strict=False)]
        ends.append(min(row.ends[0], len(ids)))
    return [Tokens(last.ids, learned, [*ends, *last.ends])]


def _from(start: int, ids: list[int]) -> Tokens:
    return Tokens(ids, [False] * start + [True] * (len(ids) - start), [len(ids)])


def _shared(a: list[int], b: list[int]) -> list[int]:
    """The tokens that both begin with."""
    return [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]
