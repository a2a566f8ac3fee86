"""A method while its comparison runs: its size, its runs, the learning rate that was chosen, its row of results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

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
    def finished_runs(self) -> list[RunRow]:
        """The runs that did not fail."""
        return [run for run in self.runs.values() if run.status == "ok"]

    @property
    def at_edge(self) -> Literal["lowest", "highest"] | None:
        """Whether the chosen rate is the lowest or the highest of three or more: a better one may lie beyond."""
        rates = self.listed.learning_rates
        if self.chosen is None or len(rates) < 3 or self.chosen not in (rates[0], rates[-1]):
            return None
        return "lowest" if self.chosen == rates[0] else "highest"

    def choose(self, seed: int) -> None:
        """Choose among the rates, once all were tried with this seed, by the held-out loss after training; of
        classifiers, too, since the accuracy on a few rows is a matter of luck."""
        runs = [self.runs.get((rate, seed)) for rate in self.listed.learning_rates]
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
        listed, size, method = self.listed, self.size, METHODS[self.listed.method]
        failed = [f"seed {run.seed}: {run.error}" for run in self._counted(seeds) if run.error]
        row = MethodRow(
            method=listed.label,
            title=method.title if listed.label == listed.method else listed.label,
            peft_type=method.peft_type,
            settings={**listed.settings, **(size.settings if size else {})},
            bound=method.is_bound,
            size="",
            matched=False,
            learning_rates=listed.learning_rates,
            chosen=self.chosen,
            at_edge=self.at_edge,
            status=self.status(seeds),
            error=self.error or "; ".join(failed) or None,
            rerun=commands.get("rerun"),
            train=commands.get("train"),
        )
        if size is None:
            return row
        # A run knows how many classes there are, the size does not.
        trainable = next((run.trainable_parameters for run in self.finished_runs), None) or size.trainable_parameters
        return replace(
            row,
            size=size.size,
            matched=size.matched,
            fixed=size.fixed,
            adapter_parameters=size.adapter_parameters,
            trainable_parameters=trainable,
            total_parameters=size.total_parameters + trainable - size.trainable_parameters,
            off_budget=None if size.off_budget is None else round(size.off_budget, 5),
        )

    def run_rows(self) -> list[RunRow]:
        """The lines of its runs in results.jsonl."""
        runs = [run for _, run in sorted(self.runs.items())]
        return [replace(run, method=self.listed.label, counted=run.learning_rate == self.chosen) for run in runs]
