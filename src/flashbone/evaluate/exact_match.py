"""Exact match: a model answers questions by greedy decoding, and its answers are compared with the references."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashbone.errors import ConfigError
from flashbone.evaluate.answers import given_answer, is_same, wanted_answer
from flashbone.train.data.layouts import ALPACA
from flashbone.train.tokenizers import prompt_ids, stop_tokens

Prompt = str | list[dict[str, str]]  # a text as it is, or a conversation for the tokenizer's chat template

# Whatever else a model's own generation settings ask for, such as sampling or a penalty on repetition, is taken back.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,  # trainers switch it off
}


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


@torch.no_grad()
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
    _check_lengths(model, prompts, max_new_tokens)
    stops = stop_tokens(model, tokenizer)
    order = sorted(range(len(rows)), key=lambda row: -len(prompts[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if all(row in done for row in batch):
                continue
            with amp():
                outputs = _generated(model, tokenizer, [prompts[row] for row in batch], stops, max_new_tokens)
            for row, ids in zip(batch, outputs, strict=True):
                if row not in done:
                    yield _judged(row, tokenizer, ids, stops, rows[row][1])
    finally:
        model.train(was_training)


def _generated(
    model: Any, tokenizer: Any, prompts: list[list[int]], stops: list[int], max_new_tokens: int
) -> list[list[int]]:
    """What follows each prompt, up to the token that ends it, which is included."""
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    outputs = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        **_GREEDY,
    )
    return [_cut(row[longest:].tolist(), stops) for row in outputs]


def _cut(ids: list[int], stops: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return ids if end is None else ids[: end + 1]


def _judged(row: int, tokenizer: Any, ids: list[int], stops: list[int], reference: str) -> Answered:
    kept = ids[:-1] if ids and ids[-1] in stops else ids
    text, wanted = tokenizer.decode(kept, skip_special_tokens=True), wanted_answer(reference)
    answer = given_answer(text, wanted)
    return Answered(row, text, answer, wanted, is_same(answer, wanted), len(ids))


def check_room(model: Any, tokenizer: Any, rows: Sequence[tuple[Prompt, str]], max_new_tokens: int) -> None:
    """Refuse rows that `answer_rows` could not answer.

    Raises:
        ConfigError: a prompt is empty, or is longer with its answer than the model's positions.
    """
    _check_lengths(model, [prompt_ids(tokenizer, prompt) for prompt, _ in rows], max_new_tokens)


def _check_lengths(model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ConfigError(f"row {empty[0]}: its prompt has no tokens; nothing could follow it")
    positions = getattr(model.config, "max_position_embeddings", None)
    row, longest = max(enumerate(map(len, prompts)), key=lambda pair: pair[1], default=(0, 0))
    if positions and longest + max_new_tokens > positions:
        raise ConfigError(
            f"row {row}: its prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's"
            f" {positions} positions; lower max_new_tokens to {max(positions - longest, 0)}, or leave the row out"
        )
