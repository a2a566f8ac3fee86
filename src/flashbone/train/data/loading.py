"""Training and held-out examples: read, checked with file and line, split, and brought into the trainer's form."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data import windows as token_windows
from flashbone.train.data.binidx import is_binidx, pair
from flashbone.train.data.formats import Example, answers, check_columns, converter, detect
from flashbone.train.data.rows import BadRow, Row, all_bad, read_rows
from flashbone.train.recipe import DataRecipe, Recipe

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
CONVERSION = 1  # counts up when the same rows become other examples, so that cached ones are not reused


@dataclass
class Data:
    """What a trainer needs: rows to learn from, rows held out and rows for a last test (if any), and the classes
    (classification)."""

    train: "Dataset"
    eval: "Dataset | None"
    labels: list[str]
    test: "Dataset | None" = None

    @property
    def conversational(self) -> bool:
        """Whether the rows need a chat template."""
        return "prompt" in self.train.column_names and not isinstance(self.train[0]["prompt"], str)


Part = int | float | str | DataRecipe | None


def load_data(recipe: Recipe, windows: token_windows.Windows | None = None, test: Part = None) -> Data:
    """Read, check and split the recipe's data.

    Args:
        recipe: Its `data` says where the rows are.
        windows: What documents of token ids are cut into; they stay whole without it.
        test: Rows for a last test, which are neither learned nor held out: a share, a number of rows, another file, or
            where they are and how they are read.

    Raises:
        FormatError: rows are malformed; the message names the first few with file and line.
        ConfigError: `data` asks for columns, splits or a part that are not there.
    """
    windows = windows or token_windows.Windows()
    examples = _load(recipe.data, recipe.task, windows)
    examples, tested = _split(examples, recipe, windows, test, "test")
    train, held_out = _split(examples, recipe, windows, recipe.data.eval, "eval")
    train, others = (
        token_windows.without_numbers(train),
        [part and token_windows.without_numbers(part) for part in (held_out, tested)],
    )
    labels: list[str] = []
    if recipe.task == "classification":
        labels = _labels(train, others, recipe.data.path)
    train = _cut_answers(train, recipe.data.turns)
    held_out = others[0] and _cut_answers(others[0], recipe.data.turns)
    tested = others[1] and _cut_answers(others[1], test.turns if isinstance(test, DataRecipe) else recipe.data.turns)
    counts = f", {len(tested)} to test" if tested else ""
    log.info("data: %d training rows, %d held out%s", len(train), len(held_out or ()), counts)
    return Data(train, held_out, labels, tested)


def _load(data: DataRecipe, task: str, windows: token_windows.Windows) -> "Dataset":
    """All examples that `data` names, on disk in datasets' cache, so that they need not fit into memory."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.fingerprint import Hasher

    path = Path(data.path)
    files = pair(path) if is_binidx(path) else (path,)
    local = len(files) > 1 or path.suffix.lower() in FILES or path.is_file()
    source = None if local else _hub(data)

    def rows() -> Iterator[Row | BadRow]:
        return read_rows(files[0]) if source is None else _dataset_rows(source, data.path)

    format, columns = _format(rows(), data, task)
    log.info("data: %s is read as %s%s", data.path, format, f" with {columns}" if columns else "")

    def generate() -> Iterator[Example]:
        examples = _examples(rows(), format, columns, data.path)
        if data.template is not None:
            examples = _in_template(examples, data.template)
        return token_windows.cut(examples, windows, data.path) if format == "tokens" else examples

    stamp = [_file_stamp(file) for file in files] if source is None else source._fingerprint
    if data.template is not None:
        _check_template(data.template, format)
    parts = (CONVERSION, stamp, format, columns, astuple(windows) if format == "tokens" else ())
    key = Hasher.hash(parts if data.template is None else (*parts, data.template))
    try:
        examples = Dataset.from_generator(generate, fingerprint=key)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, FormatError | OSError):
            raise cause from None
        raise
    assert isinstance(examples, Dataset)
    if format == "tokens":
        about = data.path, token_windows.count(examples), len(examples), windows.length or "any number of"
        log.info("data: %s: %d documents make %d windows of at most %s tokens", *about)
    return _slice(examples, data) if local else examples


def _format(rows: Iterator[Row | BadRow], data: DataRecipe, task: str) -> tuple[str, dict[str, str]]:
    """The format of the rows: as asked, or by the columns of the first one that can be read."""
    if data.format != "auto" and (data.format == "classification") != (task == "classification"):
        raise ConfigError(f"data.format {data.format} does not go with task {task}")
    first = next((item[1] for item in rows if not isinstance(item, BadRow)), None)
    if not isinstance(first, dict) or not first:  # reading on reports what is wrong
        fallback = "classification" if task == "classification" else "text"
        return (fallback if data.format == "auto" else data.format), data.columns
    check_columns(list(first), data.columns, data.path)
    if data.format == "auto":
        return detect(list(first), data.columns, task, data.path)
    return data.format, data.columns


def _examples(rows: Iterator[Row | BadRow], format: str, columns: dict[str, str], where: str) -> Iterator[Example]:
    """Every row as an example; at the end, one error for all the rows that were none."""
    convert = converter(format, columns)
    bad: list[str] = []
    count = 0
    for item in rows:
        count += 1
        if isinstance(item, BadRow):
            bad.append(str(item))
            continue
        try:
            yield convert(item[1])
        except FormatError as error:
            bad.append(f"{item[0]}: {error}")
    if not count:
        raise FormatError(f"{where}: no rows")
    if bad:
        raise all_bad(bad)


def _check_template(template: str, format: str) -> None:
    if format not in ("prompt-completion", "alpaca"):
        raise ConfigError(f"data.template: rows of format {format} have no prompt of their own; leave it out")
    if "{prompt}" not in template:
        raise ConfigError(f"data.template: got {template!r}, wanted a text with {{prompt}} in it")


def _in_template(examples: Iterator[Example], template: str) -> Iterator[Example]:
    """The examples with the template around their prompts; conversations are left as they are."""
    for example in examples:
        if "prompt" in example:
            example = {**example, "prompt": template.replace("{prompt}", example["prompt"])}
        yield example


def _file_stamp(path: Path) -> tuple[str, int, int]:
    """What changes when the file does."""
    about = path.stat()
    return str(path.resolve()), about.st_mtime_ns, about.st_size


def _dataset_rows(dataset: Any, name: str) -> Iterator[Row]:
    """Rows of a hub dataset; class numbers become the classes' names."""
    named = {key: kind for key, kind in dataset.features.items() if hasattr(kind, "int2str")}
    for number, row in enumerate(dataset, 1):
        plain = {key: kind.int2str(row[key]) for key, kind in named.items() if row[key] is not None and row[key] >= 0}
        yield f"{name}: row {number}", {**row, **plain}


def _hub(data: DataRecipe) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(data.path, data.subset, split=data.split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"data.path {data.path} ({data.split}): no such file, and no dataset of that id could be loaded: {reason}"
        ) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        script = str(error).rpartition(" ")[2]
        raise ConfigError(
            f"data.path {data.path}: its rows come out of a script, {script}, and scripts are never run; "
            "give them as a .jsonl, .csv or .parquet file"
        ) from None


def _slice(examples: "Dataset", data: DataRecipe) -> "Dataset":
    """The rows that `split` names; a file has one split, called train."""
    from datasets import ReadInstruction

    if data.split == "train":
        return examples
    total = token_windows.count(examples)
    try:
        parts = ReadInstruction.from_spec(data.split).to_absolute({"train": total})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"data.split {data.split}: {error}; a file has the split train, as in train[:100]") from None
    rows = [i for part in parts for i in range(part.from_ or 0, total if part.to is None else part.to)]
    if not rows:
        raise ConfigError(f"data.split {data.split}: selects none of the {total} rows of {data.path}")
    return token_windows.select(examples, rows)


def _split(
    examples: "Dataset", recipe: Recipe, windows: token_windows.Windows, held: Part, field: str
) -> "tuple[Dataset, Dataset | None]":
    """The rows without those of `data.<field>`, and these; the draw depends on the seed only."""
    if isinstance(held, DataRecipe):
        return examples, _load(held, recipe.task, windows)
    if isinstance(held, str):
        return examples, _load(replace(recipe.data, path=held, split="train"), recipe.task, windows)
    if not held:
        return examples, None
    if held < 0 or (isinstance(held, float) and held >= 1 and not held.is_integer()):
        raise ConfigError(f"data.{field} is {held}; a share below 1, a number of rows, a file or null was wanted")
    total = token_windows.count(examples)
    count = int(held) if held >= 1 else max(1, round(total * held))
    if count >= total:
        raise ConfigError(
            f"data.{field} {held} holds out {count} of the {total} rows of {recipe.data.path}, "
            "which leaves none to learn from; lower it, or set it to null"
        )
    seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    return token_windows.draw(examples, count, seed)


def _cut_answers(examples: "Dataset", turns: str) -> "Dataset":
    """Conversations as prompts and completions; other rows are left as they are."""
    if "messages" not in examples.column_names:
        return examples

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = list(itertools.chain.from_iterable(answers(messages, turns) for messages in batch["messages"]))
        return {name: [row[name] for row in rows] for name in ("prompt", "completion")}

    return examples.map(cut, batched=True, remove_columns=examples.column_names, desc="Cutting conversations")


def _labels(train: "Dataset", others: "list[Dataset | None]", where: str) -> list[str]:
    """The classes in the training rows, sorted, as numbers where all are numbers."""
    labels = sorted(train.unique("label"))
    if all(label.lstrip("-").isdigit() for label in labels):
        labels.sort(key=int)
    if len(labels) < 2:
        raise FormatError(f"{where}: all training rows have the label {labels[0]!r}; two or more classes were wanted")
    strange = sorted({label for part in others if part for label in part.unique("label")} - set(labels))
    if strange:
        raise FormatError(f"{where}: held-out rows have labels that no training row has: {', '.join(strange)}")
    return labels
