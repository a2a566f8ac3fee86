"""results.jsonl: the fields of its lines, for those who write them and those who read them (`reading.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from flashbone.files.outputs import write_text
from flashbone.files.records import finite

FEWEST_ROWS = 10  # of a test set that is resampled: fewer do not show how rows vary


@dataclass(frozen=True)
class LossCurve:
    """Loss over a run; None where it was not finite. Seconds are those of making the adapter and of training steps.

    Of held-out rows `rows` has the summed loss of each row at each step, and `weights` how many tokens that is, or 1 of
    classifiers; only curves of counted runs have them.
    """

    step: tuple[int, ...]
    seconds: tuple[float | None, ...]
    loss: tuple[float | None, ...]
    accuracy: tuple[float | None, ...] | None = None  # of a classifier's held-out rows, as the next
    macro_f1: tuple[float | None, ...] | None = None
    rows: tuple[tuple[float, ...], ...] | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        counts = len(self.step), len(self.seconds), len(self.loss)
        if len(set(counts)) > 1:
            raise ValueError("got {} steps, {} seconds and {} losses; wanted as many of each".format(*counts))
        if self.rows is not None and {len(self.weights or ()), *map(len, self.rows)} != {len(self.rows[0])}:
            raise ValueError("got losses of other numbers of held-out rows at different steps; wanted the same")


@dataclass(frozen=True)
class FairnessRow:
    """What was checked for fairness, and what was wrong."""

    checked: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where figures were made: what decides them besides the configuration."""

    device: str
    hardware: str
    versions: dict[str, str]
    commit: str | None
    date: str


@dataclass(frozen=True)
class HeaderRow:
    """The first line: what was compared, on what, and how."""

    kind: ClassVar = "comparison"
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
    jobs: int | Literal["ray"] | None = None
    commit: str | None = None
    date: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class MethodRow:
    """A method: its size, the learning rates tried, and its outcome; sizes as in `MethodSize`."""

    kind: ClassVar = "method"
    method: str
    title: str
    size: str
    matched: bool
    bound: bool
    learning_rates: tuple[float, ...]
    status: Literal["ok", "failed", "unfinished"]
    fixed: bool = False
    peft_type: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    adapter_parameters: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
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
    """A training run with one learning rate and one seed; a failed one has an error and no figures.

    Attributes:
        counted: whether the learning rate is the one that was chosen for the method.
        tokens: that the model was given, paddings aside.
        digest: one hash of all batches in their order.
        overlap: test rows that were learned or held out as well.
        test_scores, test_weights: of single rows; the quotient of their sums is the metric.
        startup_s: the time that making the adapter took, with whatever it computes for its start.
        peak_mib: within training steps; above_model_mib: of that above the loaded model.
    """

    kind: ClassVar = "run"
    method: str
    seed: int
    counted: bool
    status: Literal["ok", "failed"]
    learning_rate: float | None = None
    error: str | None = None
    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    digest: str | None = None
    rows: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, int] = field(default_factory=dict)
    train: LossCurve | None = None
    held_out: LossCurve | None = None
    test: dict[str, float | None] | None = None
    test_scores: tuple[float | None, ...] | None = None
    test_weights: tuple[float | None, ...] | None = None
    step_ms: float | None = None
    train_s: float | None = None
    startup_s: float | None = None
    load_s: float | None = None
    peak_mib: float | None = None
    peak_of: str | None = None
    above_model_mib: float | None = None
    adapter_bytes: float | None = None
    grad_norm_first: float | None = None
    adapter_parameters: int | None = None
    trainable_parameters: int | None = None
    about: Provenance | None = None

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


def to_json(row: HeaderRow | MethodRow | RunRow) -> str:
    """A row as one line; a number that is not finite becomes null, since JSON has none."""
    return json.dumps(finite({"kind": row.kind, **asdict(row)}), allow_nan=False) + "\n"


def write_results(rows: Sequence[HeaderRow | MethodRow | RunRow], file: Path) -> None:
    """Write results.jsonl, which appears whole."""
    write_text(file, "".join(map(to_json, rows)))
