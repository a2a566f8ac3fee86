"""Rows as the trainer takes them: tokenised, cut to their length, counted, and checked before the first step."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError, FormatError, shortened
from flashbone.train.data.formats import SHOWN_BAD_ROWS
from flashbone.train.data.layouts import Example
from flashbone.train.data.preferences import rejected
from flashbone.train.data.tokens import Tokens, end_marks, end_token, has_names, tokenise, writes_names
from flashbone.train.data.windows import largest_id

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

TOKENS = ("input_ids", "labels", "rejected_ids", "rejected_labels", "label")  # columns of what a trainer takes
NOTHING = -1  # in the place of an end token, where an answer has none
ANY = -1  # in the place of a row's number, where a problem is not one row's


@dataclass(frozen=True)
class Limits:
    """What rows have to fit.

    Attributes:
        length: Tokens of a row; None for any number.
        keep_end: Cut a longer row at its beginning.
        embeddings: How many tokens the model knows; None for any number.
        learn_all: Learn prompts, too.
    """

    length: int | None = None
    keep_end: bool = False
    embeddings: int | None = None
    learn_all: bool = False


@dataclass
class Counts:
    """What became of the rows.

    Attributes:
        rows: Rows as the model sees them, before any was dropped.
        cut: Those that are longer than the limit.
        lost_ends: Answers whose end was cut off, so that it is not learned.
        empty: Rows with nothing (left) to learn, which are dropped.
        dropped: Examples of which nothing is kept.
        ends: How many answers end in each token; NOTHING for those that end in none that generation could stop at.
        unnamed: Rows with names of speakers, which the chat template leaves out.
        problems: What is wrong with a row, by its number.
    """

    rows: int = 0
    cut: int = 0
    lost_ends: int = 0
    empty: int = 0
    dropped: int = 0
    unnamed: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    problems: dict[int, str] = field(default_factory=dict)


def prepare(rows: "Dataset", tokenizer: Any, limits: Limits, workers: int | None = None) -> "tuple[Dataset, Counts]":
    """The rows as `input_ids` and `labels`, with those of rejected answers, and what became of them.

    Rows with problems are left out; `check` refuses them.
    """
    if rows.column_names == ["input_ids"]:  # windows: every token is learned, and a copy of them all is large
        unknown = _unknown([largest_id(rows)], tokenizer, limits)
        return rows, Counts(rows=len(rows), problems={ANY: unknown} if unknown else {})
    made = rows.map(
        _prepared,
        with_indices=True,
        batched=True,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "limits": limits},
        num_proc=workers,
        desc="Tokenizing",
    )
    counts, kept, columns = Counts(), [], [name for name in made.column_names if name not in TOKENS]
    known, used = set(), set()
    for place, values in enumerate(zip(*(made[name] for name in columns), strict=True)):
        outcome = dict(zip(columns, values, strict=True))
        if outcome["problem"]:
            counts.problems[outcome["row"]] = outcome["problem"]
            continue
        counts.rows += 1
        known.add(outcome["row"])
        counts.cut += outcome["is_cut"]
        counts.lost_ends += outcome["lost_ends"]
        counts.empty += outcome["is_empty"]
        counts.unnamed += outcome["has_names"]
        counts.ends.update(outcome["ends"])
        if not outcome["is_empty"]:
            kept.append(place)
            used.add(outcome["row"])
    counts.dropped = len(known) - len(used)
    if counts.unnamed and writes_names(tokenizer):
        counts.unnamed = 0
    made = made.select_columns([name for name in TOKENS if name in made.column_names])
    return (made if len(kept) == len(made) else made.select(kept)), counts


def check(
    counts: Counts,
    where: str,
    kind: str,
    length: int | None,
    allow_cut: bool,
    places: Callable[[list[int]], list[str]],
) -> None:
    """Refuse rows that cannot be learned as intended; log what was cut and dropped.

    Args:
        counts: What `prepare` counted.
        where: The data's name.
        kind: What the rows are for: training, held-out or test.
        length: Tokens of a row that are kept.
        allow_cut: Do not refuse to cut more than half of the rows.
        places: Where the rows of these numbers are, for errors.

    Raises:
        FormatError: rows have problems; the first few are named.
        ConfigError: nothing is left to learn, too much is cut, or answers have no end.
    """
    if counts.problems:
        raise FormatError(_named_problems(counts.problems, places))
    if counts.empty == counts.rows:
        raise ConfigError(f"no {kind} row has a token of its answer within training.max_length {length}; raise it")
    if endless := counts.ends[NOTHING]:
        raise ConfigError(
            f"{where}: {endless} of {counts.ends.total()} answers end in no token that"
            " generation could stop at; end the assistant's turns in the tokenizer's end token, as in {{ eos_token }},"
            " in a template for training.chat_template_path (inside {% generation %}, if it has that)"
        )
    if 2 * counts.cut > counts.rows and not allow_cut:
        raise ConfigError(
            f"{where}: training.max_length {length} cuts {counts.cut} of {counts.rows} {kind} rows, and"
            f" {counts.lost_ends} answers lose their end; raise it, or set data.allow_cut: true"
        )
    if counts.unnamed:
        log.info("data: %s: the chat template leaves out 'name' in %d %s rows", where, counts.unnamed, kind)
    if counts.cut or counts.empty:
        log.info(
            "data: %s: of %d %s rows %d are cut at training.max_length %s; %d answers lose their end, and %d rows have"
            " nothing left to learn and are dropped",
            *(where, counts.rows, kind, counts.cut, length, counts.lost_ends, counts.empty),
        )


def _named_problems(problems: dict[int, str], places: Callable[[list[int]], list[str]]) -> str:
    """The first few problems, each with its place; places are only looked up for these."""
    numbers = list(problems)[:SHOWN_BAD_ROWS]
    where = dict(zip(numbers, places(numbers), strict=True))
    return shortened((f"{where.get(number)}: {text}" for number, text in problems.items()), SHOWN_BAD_ROWS, "; ")


def _prepared(batch: dict[str, list[Any]], numbers: list[int], tokenizer: Any, limits: Limits) -> dict[str, list[Any]]:
    marks = end_marks(tokenizer)
    entries = []
    for place, number in enumerate(numbers):
        # sources may have different columns
        example = {name: values[place] for name, values in batch.items() if values[place] is not None}
        problem, made, worse = "", [], Tokens([], [], []) if "rejected" in example else None
        try:
            made = tokenise(example, tokenizer, limits.learn_all)
            if worse is not None:
                (worse,) = tokenise(rejected(example), tokenizer, limits.learn_all)
            seen = made if worse is None else [*made, worse]
            problem = next(filter(None, (_unknown(row.ids, tokenizer, limits) for row in seen)), "")
        except FormatError as error:
            problem = str(error)
        for row in made or [Tokens([], [], [])]:
            sides = [row] if worse is None else [row, worse]
            short = [side.cut(limits.length, limits.keep_end) for side in sides]
            ends = [end_token(side, end, tokenizer, marks) for side in sides for end in side.ends]
            entry = {
                "input_ids": short[0].ids,
                "labels": short[0].labels,
                "row": number,
                "problem": problem,
                "has_names": has_names(example),
                "is_cut": any(len(cut.ids) < len(side.ids) for cut, side in zip(short, sides, strict=True)),
                "lost_ends": sum(len(side.ends) - len(cut.ends) for cut, side in zip(short, sides, strict=True)),
                # nothing predicts the first token; and answers may only differ in what is cut off
                "is_empty": not all(any(cut.learned[1:]) for cut in short)
                or [short[0].ids] == [s.ids for s in short[1:]],
                "ends": [NOTHING if end is None else end for end in ends],
            }
            if worse is not None:
                entry |= {"rejected_ids": short[1].ids, "rejected_labels": short[1].labels}
            entries.append(entry | ({"label": example["label"]} if "label" in example else {}))
    return {name: [entry[name] for entry in entries] for name in entries[0]}


def prepared_rows(example: Example, number: int, tokenizer: Any, limits: Limits) -> Iterator[dict[str, Any]]:
    """The rows of one example, each with what became of it.

    Raises:
        FormatError: the row of this number has a problem.
    """
    made = _prepared({name: [value] for name, value in example.items()}, [number], tokenizer, limits)
    if problem := made["problem"][0]:
        raise FormatError(f"data: row {number + 1} of the stream: {problem}")
    yield from (dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True))


def _unknown(ids: list[int], tokenizer: Any, limits: Limits) -> str:
    """Names a token that the model has no embedding for; on a GPU it would fail an assertion in the first step."""
    top = max(ids, default=0)
    if limits.embeddings is None or top < limits.embeddings:
        return ""
    token = tokenizer.convert_ids_to_tokens(top)
    return (
        f"holds the token id {top}{f' ({token!r})' if token else ''}, but the model has {limits.embeddings} embeddings,"
        f" 0 to {limits.embeddings - 1}; was it tokenised for another model?"
    )
