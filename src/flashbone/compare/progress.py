"""A method while its comparison runs: its size, its runs, the learning rate that was chosen, its row of results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from flashbone.compare.config import ListedMethod
from flashbone.compare.methods import METHODS
from flashbone.compare.results import MethodRow, RunRow
from flashbone.compare.sizes import MethodSize


@dataclass
class MethodProgress:
    """A method of a comparison while it runs.

    Attributes:
        listed: the method as the configuration lists it.
        size: its size; None where there is none that works, which `error` explains.
        runs: those that have ended: (learning rate, seed) -> the result.
        chosen: its learning rate, once all have been tried.
        error: why it has no figures.
    """

    listed: ListedMethod
    size: MethodSize | None = None
    runs: dict[tuple[float, int], RunRow] = field(default_factory=dict)
    chosen: float | None = None
    error: str | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that it tries."""
        return self.listed.learning_rates

    @property
    def finished_runs(self) -> list[RunRow]:
        """The runs that did not fail."""
        return [run for run in self.runs.values() if run.status == "ok"]

    @property
    def at_edge(self) -> Literal["lowest", "highest"] | None:
        """Whether the chosen rate is the lowest or the highest of three or more: a better one may lie beyond."""
        if len(self.rates) < 3 or self.chosen not in (self.rates[0], self.rates[-1]):
            return None
        return "lowest" if self.chosen == self.rates[0] else "highest"

    def choose(self, seed: int) -> None:
        """Choose among the rates, once all were tried with this seed, by the held-out loss after training; of
        classifiers, too, since the accuracy on a few rows is a matter of luck."""
        runs = [self.runs.get((rate, seed)) for rate in self.rates]
        tried = [run for run in runs if run is not None]
        if len(tried) < len(runs):
            return
        good = [run for run in tried if run.status == "ok"]
        losses = [(math.inf if run.last_held_out is None else run.last_held_out, run.learning_rate) for run in good]
        if losses:
            self.chosen = min(losses)[1]
        else:
            self.error = tried[0].error

    def status(self, seeds: Sequence[int]) -> Literal["ok", "failed", "unfinished"]:
        """Of the method: a failure with one of its seeds is one of the method, since those with which it went well
        would flatter it."""
        if self.error is not None:
            return "failed"
        counted = self._counted(seeds)
        if len(counted) < len(seeds):
            return "unfinished"
        return "ok" if all(run.status == "ok" for run in counted) else "failed"

    def _counted(self, seeds: Sequence[int]) -> list[RunRow]:
        keys = [(self.chosen, seed) for seed in seeds if self.chosen is not None]
        return [self.runs[key] for key in keys if key in self.runs]

    def method_row(self, seeds: Sequence[int], commands: Mapping[str, str]) -> MethodRow:
        """The method's line of results.jsonl."""
        listed, method = self.listed, METHODS[self.listed.method]
        failed = [f"seed {run.seed}: {run.error}" for run in self._counted(seeds) if run.error]
        return MethodRow(
            method=listed.label,
            title=method.title if listed.label == listed.method else listed.label,
            peft_type=method.peft_type,
            bound=method.is_bound,
            learning_rates=self.rates,
            chosen=self.chosen,
            at_edge=self.at_edge,
            status=self.status(seeds),
            error=self.error or "; ".join(failed) or None,
            rerun=commands.get("rerun"),
            train=commands.get("train"),
            **self._size_fields(),
        )

    def _size_fields(self) -> dict[str, Any]:
        if self.size is None:
            return {"settings": self.listed.settings, "size": "", "matched": False}
        fields = asdict(self.size)
        fields["settings"] = {**self.listed.settings, **self.size.settings}
        if self.finished_runs:  # which know how many classes there are
            trainable = self.finished_runs[0].trainable_parameters or self.size.trainable_parameters
            fields["total_parameters"] += trainable - self.size.trainable_parameters
            fields["trainable_parameters"] = trainable
        return fields

    def run_rows(self) -> list[RunRow]:
        """The lines of its runs in results.jsonl."""
        return [self._run_row(run) for _, run in sorted(self.runs.items())]

    def _run_row(self, run: RunRow) -> RunRow:
        """With its label; losses of single held-out rows, which are long, only where they are used."""
        counted, curve = run.learning_rate == self.chosen, run.held_out
        curve = curve if counted or curve is None else replace(curve, rows=None, weights=None)
        return replace(run, method=self.listed.label, counted=counted, held_out=curve)
