"""results.jsonl: the fields of its lines, and the one function that reads and checks them."""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flashbone.errors import FormatError

FEWEST_ROWS = 10  # of a test set that is resampled: fewer do not show how rows vary
NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
RowType = TypeVar("RowType")


@dataclass(frozen=True)
class LossCurve:
    """Loss over a run; None where it was not finite. Seconds include making the adapter."""

    step: tuple[int, ...]
    seconds: tuple[float | None, ...]
    loss: tuple[float | None, ...]

    def __post_init__(self) -> None:
        counts = len(self.step), len(self.seconds), len(self.loss)
        if len(set(counts)) > 1:
            raise ValueError("got {} steps, {} seconds and {} losses; wanted as many of each".format(*counts))


@dataclass(frozen=True)
class FairnessRow:
    """What was checked for fairness, and what was wrong."""

    checked: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeaderRow:
    """The first line: what was compared, on what, and how."""

    version: Literal[1]
    name: str
    model: str
    task: str
    metric: Literal["accuracy", "loss", "exact_match"]
    higher_is_better: bool
    data: dict[str, Any]
    seeds: tuple[int, ...]
    device: str
    versions: dict[str, Any]
    fairness: FairnessRow
    finished: bool
    config: str | None = None
    budget: dict[str, Any] | None = None
    tolerance: float | None = None
    steps: int | None = None
    epochs: float | None = None
    hardware: str | None = None
    jobs: int | None = None
    commit: str | None = None
    date: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class MethodRow:
    """A method: its size, the learning rates tried, and its outcome."""

    method: str
    title: str
    size: str
    matched: bool
    bound: bool
    learning_rates: tuple[float, ...]
    status: Literal["ok", "failed", "unfinished"]
    adapter_parameters: int | None = None
    off_budget: float | None = None
    chosen: float | None = None
    at_edge: Literal["lowest", "highest"] | None = None
    error: str | None = None
    rerun: str | None = None
    train: str | None = None

    @property
    def is_candidate(self) -> bool:
        """Whether the method may be called best: matched in size, not a bound, not failed."""
        return self.matched and not self.bound and self.status != "failed"


@dataclass(frozen=True)
class RunRow:
    """A training run with one learning rate and one seed; a failed one has an error and no figures."""

    method: str
    seed: int
    counted: bool
    status: Literal["ok", "failed"]
    learning_rate: float | None = None
    error: str | None = None
    train: LossCurve | None = None
    held_out: LossCurve | None = None
    test: dict[str, float | None] | None = None
    test_scores: tuple[float | None, ...] | None = None
    test_weights: tuple[float | None, ...] | None = None
    peak_of: str | None = None
    step_ms: float | None = None
    startup_s: float | None = None
    peak_mib: float | None = None
    above_model_mib: float | None = None
    adapter_bytes: float | None = None
    grad_norm_first: float | None = None

    def __post_init__(self) -> None:
        scores, weights = len(self.test_scores or ()), len(self.test_weights or ())
        if scores and scores != weights:
            raise ValueError(f"got {scores} test_scores and {weights} test_weights; wanted one of each per row")

    @property
    def finite_scores(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Scores and weights of the test rows; None unless all of them are finite."""
        scores = tuple(score for score in self.test_scores or () if score is not None)
        weights = tuple(weight for weight in self.test_weights or () if weight is not None)
        complete = len(scores) == len(weights) == len(self.test_scores or ())
        return (scores, weights) if complete and sum(weights) > 0 else None

    @property
    def resampled_scores(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """`finite_scores` where there are enough rows to resample."""
        return self.finite_scores if len(self.test_scores or ()) >= FEWEST_ROWS else None

    def figure(self, metric: str) -> float | None:
        """The metric on the test set: sum(test_scores) / sum(test_weights), or `test[metric]` where rows have no
        scores; None where it is not finite."""
        if self.finite_scores is not None:
            scores, weights = self.finite_scores
            return math.fsum(scores) / math.fsum(weights)
        return None if self.test_scores else (self.test or {}).get(metric)

    @property
    def last_held_out(self) -> float | None:
        """The held-out loss at the end of the run."""
        return self.held_out.loss[-1] if self.held_out and self.held_out.loss else None


@dataclass(frozen=True)
class ComparisonResults:
    """A whole results.jsonl."""

    header: HeaderRow
    methods: tuple[MethodRow, ...]
    runs: tuple[RunRow, ...]

    def counted(self, method: str) -> list[RunRow]:
        """The finished runs at the chosen learning rate, in the order of their seeds."""
        runs = [run for run in self.runs if run.method == method and run.counted and run.status == "ok"]
        return sorted(runs, key=lambda run: run.seed)

    def method(self, key: str) -> MethodRow:
        """The method with this key."""
        return next(method for method in self.methods if method.method == key)

    def label(self, key: str) -> str:
        """A method's title; with its key where two methods have the same title."""
        title = self.method(key).title
        return title if sum(method.title == title for method in self.methods) == 1 else f"{title} [{key}]"


def read_results(path: Path) -> ComparisonResults:
    """Read and check a results.jsonl, which may be unfinished and hold failed methods.

    Raises:
        FormatError: the file is missing, or a line is wrong: where, what was got, what was wanted.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as a results.jsonl: {error}") from error
    if not text:
        raise FormatError(f"{path}: the file is empty; wanted the output of `flashbone compare`")
    header, methods, runs = None, {}, {}
    # splitlines would also split at characters that a title may hold.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        where = f"{path}, line {number}"
        row = _json_object(line, where)
        kind = row.get("kind")
        if (kind == "comparison") != (number == 1):
            raise FormatError(f"{where}: got {_short(kind)} as kind; the comparison must be line 1 and no other line")
        if number == 1:
            header = _from_json(HeaderRow, row, where)
        elif kind == "method":
            method = _from_json(MethodRow, row, where)
            if methods.setdefault(method.method, method) is not method:
                raise FormatError(f"{where}: the method {_short(method.method)} appears twice")
        elif kind == "run":
            run = _from_json(RunRow, row, where)
            _check_run(run, methods, runs, where)
            runs[run.method, run.learning_rate, run.seed] = run
        else:
            raise FormatError(f"{where}: got {_short(kind)} as kind, wanted method or run")
    assert header is not None
    return ComparisonResults(header, tuple(methods.values()), tuple(runs.values()))


def _check_run(run: RunRow, methods: dict[str, MethodRow], runs: dict[tuple, RunRow], where: str) -> None:
    """A run belongs to a method, appears once, and scores as many test rows as the others, with which it is paired."""
    if run.method not in methods:
        raise FormatError(f"{where}: got a run of {_short(run.method)}, but no line above describes that method")
    if (run.method, run.learning_rate, run.seed) in runs:
        rate = f"learning rate {run.learning_rate} and seed {run.seed}"
        raise FormatError(f"{where}: the run of {run.method} with {rate} appears twice")
    others = {len(other.test_scores) for other in runs.values() if other.test_scores is not None}
    if run.test_scores is not None and others - {len(run.test_scores)}:
        rows = len(run.test_scores)
        raise FormatError(
            f"{where}: got scores of {rows} test rows, but a run above has {others.pop()}; wanted the same"
        )


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: is not valid JSON ({error}); was the file cut off?") from error
    if not isinstance(row, dict):
        raise FormatError(f"{where}: got {_short(row)}, wanted a JSON object")
    return row


def _from_json(kind: type[RowType], row: dict[str, Any], where: str) -> RowType:
    """A dataclass from a JSON object, checked by the types of its fields. Other keys are ignored: later versions may
    write more."""
    hints, wrong, values = get_type_hints(kind), [], {}
    for name, default in ((f.name, (f.default, f.default_factory)) for f in fields(kind)):  # pyright: ignore
        if name not in row:
            wrong += [f"{name} is missing"] if default == (MISSING, MISSING) else []
        elif _fits(row[name], hints[name]):
            values[name] = _converted(row[name], hints[name], f"{where}, {name}")
        else:
            wrong.append(f"{name}: got {_short(row[name])}, wanted {_wanted(hints[name])}")
    if wrong:
        raise FormatError(f"{where}: {'; '.join(wrong)}")
    try:
        return kind(**values)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (hint is float and isinstance(value, float) and math.isfinite(value))
    return hint is Any or isinstance(value, dict if is_dataclass(hint) else hint)


def _wanted(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_wanted, inner))
    if origin is Literal:
        return " or ".join(map(json.dumps, inner))
    if origin is tuple:
        return f"a list, each {_wanted(inner[0])}"
    if origin is dict and inner[1] is not Any:
        return f"an object, each {_wanted(inner[1])}"
    return NAMES.get(hint, "an object")


def _converted(value: Any, hint: Any, where: str) -> Any:
    """A value that fits: lists as tuples, objects as the dataclass that the hint names."""
    kind = next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)
    if kind is not None and value is not None:
        return _from_json(kind, value, where)  # pyright: ignore
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
