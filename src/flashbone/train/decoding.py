"""What a model writes after prompts: batches padded on the left, greedy unless sampling is asked for."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from flashbone.errors import ConfigError

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
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: A text that has not ended by itself is cut here.
        temperature: 0 takes the likeliest token; None is 0, or 1 where one of the next two is set.
        top_p: Sample among the likeliest tokens that have this share of the probability.
        top_k: Sample among so many of the likeliest tokens; 0 is all.
        seed: Of sampling; None for another one each time.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature is None or 0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "more than 0 and at most 1"),
            "top_k": (self.top_k is None or self.top_k >= 0, "0 or more"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 on"),
        }
        wrong = [
            f"{name}: got {getattr(self, name)}, wanted {range}" for name, (fits, range) in wanted.items() if not fits
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise ConfigError(
                "temperature 0 takes the likeliest token, so there is nothing to sample; leave top_p and top_k out"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.temperature) or (self.temperature is None and (self.top_p, self.top_k) != (None, None))

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        if not self.samples:
            return {**_GREEDY, "max_new_tokens": self.max_new_tokens}
        sampled = {"do_sample": True, "temperature": float(self.temperature or 1), "top_p": self.top_p or 1.0}
        return {**_GREEDY, **sampled, "top_k": self.top_k or 0, "max_new_tokens": self.max_new_tokens}


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Eval mode; afterwards the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The numbers of the prompts, the longest first: what needs most memory is tried at once."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stops: list[int],
    decoding: Decoding,
    adapters: Sequence[str] | None = None,
    amp: Any = nullcontext,
) -> list[list[int]]:
    """What follows each prompt of a batch, up to the token that ends it, which is included.

    Args:
        model: In eval mode.
        tokenizer: For its padding token.
        prompts: Tokens.
        stops: The tokens that end a text.
        decoding: How tokens are chosen.
        adapters: Of each prompt, by PEFT's names; None for the active ones.
        amp: Makes the context in which the model is called, such as one for mixed precision.
    """
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    with amp():
        outputs = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            eos_token_id=stops or None,
            pad_token_id=pad,
            **decoding.arguments(),
            **({} if adapters is None else {"adapter_names": list(adapters)}),
        )
    return [_cut(row[longest:].tolist(), stops) for row in outputs]


def _cut(ids: list[int], stops: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return ids if end is None else ids[: end + 1]


def text_of(tokenizer: Any, ids: list[int], stops: Collection[int]) -> str:
    """The text of what was written, without the token that ended it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in stops else ids, skip_special_tokens=True)


def check_lengths(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what leaves the model no room.

    Raises:
        ConfigError: a prompt is empty, or is longer with its answer than the model's positions.
    """
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ConfigError(f"row {empty[0]}: its prompt has no tokens; nothing could follow it")
    row, longest = max(enumerate(map(len, prompts)), key=lambda pair: pair[1], default=(0, 0))
    limit = positions(model)
    if limit and longest + max_new_tokens > limit:
        raise ConfigError(
            f"row {row}: its prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's"
            f" {limit} positions; lower max_new_tokens to {max(limit - longest, 0)}, or leave the row out"
        )


def positions(model: Any) -> int | None:
    """How many tokens the model can see; None for any number."""
    return getattr(model.config, "max_position_embeddings", None)
