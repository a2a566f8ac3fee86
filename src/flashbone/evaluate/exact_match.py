"""Exact match: a model answers questions by greedy decoding, and its answers are compared with the references."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flashbone.train.data.answers import given_answer, is_same, wanted_answer
from flashbone.train.data.makers import ALPACA
from flashbone.train.decoding import Decoding, answering, batches, check_lengths, continuations, text_of
from flashbone.train.tokenizers import prompt_ids, stop_tokens

Prompt = str | list[dict[str, str]]  # a text as it is, or a conversation for the tokenizer's chat template


@dataclass(frozen=True)
class Answered:
    """One row's result.

    Attributes:
        row: its number in the rows that were given, from 0.
        text: what the model wrote, without the token that ended it.
        answer: the answer in the text; None if there is none.
        wanted: the answer in the reference.
        right: whether the two are the same.
        tokens: how many were generated, the one that ended the text included.
    """

    row: int
    text: str
    answer: str | None
    wanted: str
    right: bool
    tokens: int


def make_prompt(question: str, template: str | None = None, chat: bool = False) -> Prompt:
    """What the model is given.

    Args:
        question: The question.
        template: A text in which `{question}` stands for it; "alpaca": the Bone paper's. None: the question alone.
        chat: Make it the user's turn of a conversation.
    """
    text = question
    if template is not None:
        text = ALPACA.format(instruction=question) if template == "alpaca" else template.replace("{question}", question)
    return [{"role": "user", "content": text}] if chat else text


def exact_matches(
    model: Any,
    tokenizer: Any,
    rows: Sequence[tuple[Prompt, str]],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    amp: Any = contextlib.nullcontext,
) -> list[Answered]:
    """Answer all rows; one result a row, in their order. See `answer_rows`."""
    results = answer_rows(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, amp=amp)
    return sorted(results, key=lambda answered: answered.row)


def answer_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[tuple[Prompt, str]],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    done: Collection[int] = (),
    amp: Any = contextlib.nullcontext,
) -> Iterator[Answered]:
    """Answer rows by greedy decoding, the longest prompts first, each as soon as its batch is finished.

    The batches follow from all rows and the batch size, whatever is done already: so a run that goes on decodes the
    same batches as one that was never stopped, and rounds alike.

    Args:
        model: A causal language model; it is put into eval mode for as long as this runs.
        tokenizer: Its tokenizer.
        rows: Prompts and reference answers.
        max_new_tokens: A text that has not ended by itself is cut here.
        batch_size: Rows that are decoded at once, padded on the left.
        done: Numbers of rows that need no answer any more.
        amp: Makes the context in which the model is called, such as one for mixed precision.

    Raises:
        ConfigError: a prompt with its answer is longer than the model's positions, or is a conversation
            and the tokenizer has no chat template.
    """
    prompts = [prompt_ids(tokenizer, prompt) for prompt, _ in rows]
    check_lengths(model, prompts, max_new_tokens)
    stops, decoding = stop_tokens(model, tokenizer), Decoding(max_new_tokens)
    with answering(model):
        for batch in batches(prompts, batch_size):
            if all(row in done for row in batch):
                continue
            outputs = continuations(model, tokenizer, [prompts[row] for row in batch], stops, decoding, amp=amp)
            for row, ids in zip(batch, outputs, strict=True):
                if row not in done:
                    yield _judged(row, text_of(tokenizer, ids, stops), len(ids), rows[row][1])


def _judged(row: int, text: str, tokens: int, reference: str) -> Answered:
    wanted = wanted_answer(reference)
    answer = given_answer(text, wanted)
    return Answered(row, text, answer, wanted, is_same(answer, wanted), tokens)


def check_room(model: Any, tokenizer: Any, rows: Sequence[tuple[Prompt, str]], max_new_tokens: int) -> None:
    """Refuse rows that `answer_rows` could not answer.

    Raises:
        ConfigError: a prompt is empty, or is longer with its answer than the model's positions.
    """
    check_lengths(model, [prompt_ids(tokenizer, prompt) for prompt, _ in rows], max_new_tokens)
