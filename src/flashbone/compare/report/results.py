"""What a results.jsonl holds, as small frozen values: the comparison, its methods, its runs and their curves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Scored = tuple[tuple[float, ...], tuple[float, ...]]
FEWEST_ROWS = 10  # a handful drawn anew says nothing of how they vary; one says that they do not


@dataclass(frozen=True)
class Curve:
    """Loss over a run; a loss that was not finite is None. Seconds start with the start-up of the adapter."""

    step: tuple[int, ...]
    seconds: tuple[float | None, ...]
    loss: tuple[float | None, ...]


@dataclass(frozen=True)
class Run:
    """One training with one learning rate and one seed; a failed one has an error and no figures."""

    method: str
    learning_rate: float | None
    seed: int
    counted: bool
    status: str
    error: str | None = None
    steps: int | None = None
    tokens: int | None = None
    digest: str | None = None
    train: Curve | None = None
    held_out: Curve | None = None
    test: dict[str, float | None] = field(default_factory=dict)
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

    @property
    def scored(self) -> Scored | None:
        """Scores and weights of the test rows; None unless every one of them is a number, and there are enough of them
        to be drawn anew."""
        return self._scored if self._scored is not None and len(self._scored[0]) >= FEWEST_ROWS else None

    @property
    def _scored(self) -> Scored | None:
        if not self.test_scores or not self.test_weights:
            return None
        scores = tuple(s for s in self.test_scores if s is not None)
        weights = tuple(w for w in self.test_weights if w is not None)
        complete = len(scores) == len(self.test_scores) and len(weights) == len(self.test_weights)
        return (scores, weights) if complete and sum(weights) > 0 else None

    def figure(self, metric: str) -> float | None:
        """The metric on the test set: sum(test_scores) / sum(test_weights), or `test[metric]` where rows have no
        scores; None where it is not finite."""
        if self._scored is not None:
            scores, weights = self._scored
            return math.fsum(scores) / math.fsum(weights)
        return None if self.test_scores else self.test.get(metric)

    @property
    def last_held_out(self) -> float | None:
        """The held-out loss at the end of the run."""
        return self.held_out.loss[-1] if self.held_out and self.held_out.loss else None


@dataclass(frozen=True)
class Method:
    """A method of the comparison: its size, its grid of learning rates and what became of it."""

    method: str
    title: str
    peft_type: str | None
    settings: dict[str, Any]
    size: str
    matched: bool
    bound: bool
    fixed: bool
    adapter_parameters: int | None
    trainable_parameters: int | None
    total_parameters: int | None
    off_budget: float | None
    learning_rates: tuple[float, ...]
    chosen: float | None
    at_edge: str | None
    status: str
    error: str | None
    rerun: str | None
    train: str | None


@dataclass(frozen=True)
class Header:
    """The first line: what was compared, on what, and how."""

    name: str
    config: str | None
    model: str
    task: str
    metric: str
    higher_is_better: bool
    data: dict[str, Any]
    budget: dict[str, Any] | None
    tolerance: float | None
    steps: int | None
    epochs: float | None
    seeds: tuple[int, ...]
    device: str
    hardware: str | None
    jobs: int | None
    versions: dict[str, Any]
    commit: str | None
    date: str | None
    command: str | None
    checked: tuple[str, ...]
    problems: tuple[str, ...]
    finished: bool


@dataclass(frozen=True)
class Comparison:
    """A whole results.jsonl."""

    header: Header
    methods: tuple[Method, ...]
    runs: tuple[Run, ...]

    def counted(self, method: str) -> list[Run]:
        """The finished runs at the chosen learning rate, in the order of their seeds."""
        runs = [r for r in self.runs if r.method == method and r.counted and r.status == "ok"]
        return sorted(runs, key=lambda run: run.seed)

    def method(self, key: str) -> Method:
        """The method with this key."""
        return next(method for method in self.methods if method.method == key)

    def label(self, key: str) -> str:
        """A method's title; with its key where two have the same title."""
        title = self.method(key).title
        return title if sum(method.title == title for method in self.methods) == 1 else f"{title} [{key}]"
