"""How well a language model predicts texts: loss per learned token, perplexity, bits per byte."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashbone.errors import ConfigError
from flashbone.evaluate.intervals import bootstrap_ratio
from flashbone.evaluate.results import Evaluation, figure
from flashbone.evaluate.scoring import IGNORED, by_length, padded, row_losses
from flashbone.train.data.layouts import Example
from flashbone.train.data.tokens import tokenise
from flashbone.train.data.windows import Windows
from flashbone.train.lengths import fitting_length

MAX_LENGTH = 1024  # as in training


@dataclass(frozen=True)
class Piece:
    """Tokens that the model sees at once, and the row that they are from.

    Attributes:
        row: the number of the row.
        ids: the tokens.
        labels: as many; -100 where nothing is learned. The first is context only.
    """

    row: int
    ids: list[int]
    labels: list[int]


def perplexity(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    of: str = "",
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Predict every learned token of every row.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Texts, prompts with completions, conversations or token ids, as in `train.data.layouts`.
        of: Where they are from.
        batch_size: Pieces that are computed at once.
        max_length: Tokens that the model sees at once; 1024 by default, less where the model has fewer
            positions. Longer texts are cut into windows, longer prompts with completions are cut off.
        progress: Called with the number of rows whose last piece is done.

    Raises:
        ConfigError: no token is learned, or a token has no embedding.
    """
    limit = fitting_length(max_length, MAX_LENGTH, model.config, tokenizer.model_max_length, "max_length")
    assert limit is not None
    pieces_of_rows = [pieces_of(row, example, tokenizer, limit) for row, example in enumerate(examples)]
    pieces = [piece for of_row in pieces_of_rows for piece in of_row]
    _check(pieces, model, of, limit)
    losses, tokens = np.zeros(len(examples)), np.zeros(len(examples))
    left = Counter(piece.row for piece in pieces)
    batches = by_length([piece.ids for piece in pieces], batch_size)
    scored = row_losses(model, (_batch([pieces[number] for number in batch], tokenizer) for batch in batches))
    for batch in batches:
        for number in batch:
            loss, learned = next(scored)
            losses[pieces[number].row] += loss
            tokens[pieces[number].row] += learned
        left.subtract(pieces[number].row for number in batch)
        progress(sum(left[row] == 0 for row in {pieces[number].row for number in batch}))
    sizes = [_bytes_of(example, tokenizer) for example in examples]
    dropped = sum(not of_row for of_row in pieces_of_rows)
    return _evaluation(of, losses, tokens, np.array(sizes) if None not in sizes else None, dropped)


def pieces_of(row: int, example: Example, tokenizer: Any, limit: int) -> list[Piece]:
    """The pieces of a row that the model sees, as in training: with the token that ends a text or an answer; empty if
    no token is learned."""
    rows = tokenise(example, tokenizer)
    if "text" in example or "input_ids" in example:
        ids = [int(token) for token in rows[0].ids]
        return [Piece(row, ids[part], ids[part]) for part in Windows(limit).slices(len(ids))]
    cut = [Piece(row, made.ids, made.labels) for made in (long.cut(limit) for long in rows)]
    return [piece for piece in cut if any(label != IGNORED for label in piece.labels[1:])]


def _bytes_of(example: Example, tokenizer: Any) -> int | None:
    """Bytes of a text that are predicted, all but a first token's, which is context; None where there is no text."""
    if "text" not in example:
        return None
    text = example["text"]
    first = tokenizer(text)["input_ids"][:1]
    return len(text.encode()) - len(tokenizer.decode(first, skip_special_tokens=True).encode())


def _batch(pieces: Iterable[Piece], tokenizer: Any) -> dict[str, Any]:
    pieces = list(pieces)
    return padded([piece.ids for piece in pieces], tokenizer.pad_token_id, [piece.labels for piece in pieces])


def _check(pieces: Sequence[Piece], model: Any, of: str, limit: int) -> None:
    if not pieces:
        raise ConfigError(f"{of}: no row has a learned token within {limit} tokens; raise --max-length")
    top, known = max(max(piece.ids) for piece in pieces), model.get_input_embeddings().num_embeddings
    if top >= known:
        raise ConfigError(f"{of}: has the token id {top}, but the model has {known} embeddings; is it another model's?")


def _evaluation(of: str, losses: np.ndarray, tokens: np.ndarray, sizes: np.ndarray | None, dropped: int) -> Evaluation:
    kept = tokens > 0
    losses, tokens = losses[kept], tokens[kept]
    loss = float(losses.sum() / tokens.sum())
    interval = bootstrap_ratio(losses, tokens)
    above = None if interval is None else (_exp(interval[0]), _exp(interval[1]))
    figures = [
        figure("loss (nats per token)", loss, interval, "bootstrap"),
        figure("perplexity", _exp(loss), above, "bootstrap"),
    ]
    if sizes is not None and sizes[kept].sum():
        bits, sizes = losses / math.log(2), sizes[kept]
        interval = bootstrap_ratio(bits, sizes) if sizes.all() else None  # rows without bytes alone have no rate
        figures.append(figure("bits per byte", float(bits.sum() / sizes.sum()), interval, "bootstrap"))
    return Evaluation(
        "perplexity", of, int(kept.sum()), figures, {"tokens": int(tokens.sum()), "dropped_rows": dropped}
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
