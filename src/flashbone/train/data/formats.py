"""From rows to examples: which layout of the table rows have, and what was read, left out and not used of them."""

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from flashbone.errors import ConfigError, FormatError, shortened
from flashbone.train.data.conversations import as_turns, is_prose, packed
from flashbone.train.data.counts import RowCounts, listed
from flashbone.train.data.layouts import FORMATS, Example, RowFormat
from flashbone.train.data.makers import Unlabelled
from flashbone.train.data.marks import REFUSED, check_context, check_marks, check_second_text, check_text
from flashbone.train.data.preferences import LeftOut
from flashbone.train.data.rows import BadRow, Row

SHOWN_BAD_ROWS = 5

Columns = dict[str, str]  # our name -> the data's name


@dataclass
class Reading:
    """Rows as they are read.

    Attributes:
        format: The name of their layout.
        columns: Our names of columns to theirs.
        examples: Their examples; at their end one FormatError names the bad rows, or says that there are none.
        counts: Filled while the examples are read.
    """

    format: str
    columns: Columns
    examples: Iterator[Example]
    counts: RowCounts


def column_names(task: str) -> list[str]:
    """Our names of the columns that formats of a task read."""
    formats = [entry for entry in FORMATS.values() if task in entry.tasks]
    return list(dict.fromkeys(name for entry in formats for name in entry.columns))


def choose_format(
    row: Any, task: str, where: str, asked: str = "auto", columns: Columns | None = None
) -> tuple[str, Columns]:
    """The format of rows like this one, and our names of its columns to the data's, where they differ.

    Columns have to have our names, or those that `columns` names; where no format fits so, other letters (`Prompt`) and
    the other names of the table are taken.

    Args:
        row: The first row of the data that has columns; None if there is none.
        task: a recipe's, or exact_match.
        where: The data's name, for errors.
        asked: The format, or auto: the first in the table whose columns exist, and that reads all that `columns` names.
        columns: Our names to the data's, as the user gives them.

    Raises:
        ConfigError: no such format, or one of another task; a column that no format reads, or that does not exist.
        FormatError: no format fits, or the first one leaves out what an answer depends on.
    """
    columns = columns or {}
    names = [name for name, entry in FORMATS.items() if task in entry.tasks]
    if asked not in ("auto", *FORMATS):
        raise ConfigError(f"data.format: got {asked!r}, wanted auto, {', '.join(names)}")
    if asked != "auto" and asked not in names:
        raise ConfigError(f"data.format {asked} does not go with task {task}")
    if not isinstance(row, dict) or not row:  # reading on reports what is wrong
        return (names[0] if asked == "auto" else asked), columns
    _check_columns(row, columns, task, where)
    fitting = [name for name in names if {*row, *columns}.issuperset(FORMATS[name].needed)]
    others = {name: _other_names(row, FORMATS[name], columns) for name in names}
    if not fitting:
        fitting = [name for name in names if {*row, *others[name]}.issuperset(FORMATS[name].needed)]
    for name in fitting if asked == "auto" else [asked]:
        if columns.keys() <= set(FORMATS[name].columns):
            return name, others[name]
    if fitting or asked != "auto":
        name = fitting[0] if asked == "auto" else asked
        unread = [ours for ours in columns if ours not in FORMATS[name].columns]
        reads = listed(FORMATS[name].columns)
        raise ConfigError(f"data.columns: format {name} does not read {listed(unread)}; it reads {reads}")
    refused = REFUSED.get(task, {})
    if remedy := next((words for known, words in refused.items() if row.keys() >= set(known)), None):
        raise FormatError(f"{where}: columns {listed(row)}: {remedy}")
    remedy = {
        "sft": "data.columns: {prompt: question, completion: answer}",
        "classification": "data.columns: {text: review, label: stars}",
        "exact_match": "--columns question=query,answer=response",
        "grpo": "data.columns: {prompt: question, answer: solution}",
        "kto": "data.columns: {prompt: question, completion: answer, label: thumbs}",
    }.get(task, "data.columns: {prompt: question, chosen: better, rejected: worse}")
    raise FormatError(f"{where}: columns {listed(row)} fit no format of task {task}; name them, as in {remedy}")


def _other_names(row: dict[str, Any], entry: RowFormat, columns: Columns) -> Columns:
    """Our names to the data's: as the user gives them, and those that the row has otherwise; where the user names
    columns, only what a row needs. A plain text is no conversation under another name."""
    theirs = {name: _folded(name) for name in row if name not in columns.values()}
    known = dict(columns)
    for ours in entry.needed if columns else entry.columns:
        if ours in known or ours in row:
            continue
        alike = [name for name, folded in theirs.items() if folded == ours]
        others = alike or [name for name, folded in theirs.items() if folded in entry.names.get(ours, ())]
        if ours in entry.turns and not entry.has_prompt:
            others = [name for name in others if not is_prose(row[name])]
        if len(others) == 1:  # else nobody knows which is meant
            known[ours] = others[0]
    return known


def _folded(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _check_columns(row: Collection[str], columns: Columns, task: str, where: str) -> None:
    known = column_names(task)
    formats = [entry for entry in FORMATS.values() if task in entry.tasks]
    needed = {name for entry in formats for name in entry.needed} - {n for entry in formats for n in entry.optional}
    problems = [f"{name!r} is not a name of task {task} ({', '.join(known)})" for name in columns if name not in known]
    problems += [
        f"no column {theirs!r} in {where}, which has {listed(row)}"
        for name, theirs in columns.items()
        if theirs not in row and name in needed
    ]
    if problems:
        raise ConfigError("data.columns: " + "; ".join(problems))


def converter(
    format: str, columns: Columns, turns: str = "all", refuse_context: bool = True
) -> Callable[[Any], Example]:
    """The function from a row of this format to an example; it raises FormatError with what is wrong in the row.

    Args:
        format: The format's name.
        columns: Our names of columns to the data's.
        turns: Which answers of a conversation are learned: all, or the last.
        refuse_context: Refuse a row with a column that its answer may depend on and that the format does not read.
    """
    entry = FORMATS[format]
    depends = refuse_context and (entry.has_prompt or entry.turns or "exact_match" in entry.tasks)

    def convert(row: Any) -> Example:
        if not isinstance(row, dict):
            raise FormatError(f"holds a {type(row).__name__}; an object with named columns was wanted")
        named = _named(row, columns)
        missing = [columns.get(name, name) for name in entry.needed if named.get(name) is None and name != "label"]
        if missing:
            if missing[0] in row:
                raise FormatError(f"{missing[0]!r} is null; text was wanted")
            raise FormatError(f"no {' and no '.join(map(repr, missing))}; it has {listed(row)}")
        check_marks(named, entry.columns, entry.turns)
        if depends:
            check_context(named, entry.columns, format, entry.has_prompt and "sft" in entry.tasks)
        elif format == "classification" and refuse_context:
            check_second_text(named)
        elif format == "text" and refuse_context:
            check_text(named)
        return packed(entry.convert(named), turns)

    return convert


def _named(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The row with our names of columns instead of the data's."""
    if not columns:
        return row
    theirs = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in theirs}
    return kept | {ours: row[name] for ours, name in columns.items() if name in row}


def open_examples(
    rows: Iterator[Row | BadRow],
    task: str,
    where: str,
    asked: str = "auto",
    columns: Columns | None = None,
    turns: str = "all",
    drop_unlabelled: bool = False,
    at_once: bool = False,
) -> Reading:
    """The format of the rows, and their examples.

    Args:
        rows: Rows as the readers of `rows` give them.
        task: As for `choose_format`.
        where: As there.
        asked: As there.
        columns: As there.
        turns: Which answers of a conversation are learned: all, or the last.
        drop_unlabelled: Leave out and count rows without a class, which are refused otherwise.
        at_once: Raise at the first bad row, not at the end with the first few.

    Raises:
        ConfigError: as there.
        FormatError: as there.
    """
    start: list[Row | BadRow] = []
    first = None
    for row in rows:
        start.append(row)
        if not isinstance(row, BadRow) and isinstance(row[1], dict) and row[1]:
            first = row[1]
            break
    if not start:
        raise FormatError(f"{where}: no rows")
    format, names = choose_format(first, task, where, asked, columns)
    reading = Reading(format, names, iter(()), RowCounts())
    convert = converter(format, names, turns, refuse_context=not columns)
    everything = itertools.chain(start, rows)
    reading.examples = _converted(everything, convert, where, reading, drop_unlabelled, at_once)
    return reading


def _converted(
    rows: Iterator[Row | BadRow],
    convert: Callable[[Any], Example],
    where: str,
    reading: Reading,
    drop_unlabelled: bool,
    at_once: bool,
) -> Iterator[Example]:
    bad: list[str] = []
    counts, entry = reading.counts, FORMATS[reading.format]
    used = {reading.columns.get(name, name) for name in entry.columns}
    turns = [reading.columns.get(name, name) for name in entry.turns]
    of_turns = () if entry.has_prompt else turns
    for row in rows:
        if bad and at_once:
            break
        counts.read += 1
        if isinstance(row, BadRow):
            bad.append(str(row))
            continue
        place, content = row
        try:
            if isinstance(content, dict):
                content = content | {name: as_turns(content[name]) for name in of_turns if name in content}
                counts.see(content, used, turns)
            example = convert(content)
        except Unlabelled as error:
            if drop_unlabelled:
                counts.drop("no class")
            else:
                bad.append(f"{place}: {error}")
        except LeftOut as error:
            counts.drop(str(error))
        except RecursionError:
            bad.append(f"{place}: is nested too deeply")
        except FormatError as error:
            bad.append(f"{place}: {error}")
        else:
            counts.kept += 1
            yield example
    if bad:
        raise FormatError(shortened(bad, SHOWN_BAD_ROWS, "; "))
    if not counts.kept:
        raise FormatError(f"{where}: all {counts.read} rows are left out: {listed(counts.dropped)}")
    if unseen := [theirs for theirs in reading.columns.values() if theirs not in counts.used]:
        raise FormatError(f"{where}: no row has {listed(unseen)}, which data.columns names")


def check_template(template: str, format: str) -> None:
    """Raise ConfigError where rows of this format take no template, or it has no place for the prompt."""
    if not FORMATS[format].has_prompt:
        raise ConfigError(f"data.template: rows of format {format} have no prompt of their own; leave it out")
    if "{prompt}" not in template:
        raise ConfigError(f"data.template: got {template!r}, wanted a text with {{prompt}} in it")


def in_template(examples: Iterator[Example], template: str) -> Iterator[Example]:
    """The examples with the template around their prompts; conversations are left as they are."""
    for example in examples:
        if "prompt" in example:
            example = {**example, "prompt": template.replace("{prompt}", example["prompt"])}
        yield example
