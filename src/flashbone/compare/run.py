"""A comparison from its configuration to results.jsonl: sizes, a sweep of learning rates, repeats with other seeds."""

import dataclasses
import itertools
import logging
import math
import time
from pathlib import Path

import torch
from torch import nn

from flashbone.compare import about, fairness
from flashbone.compare.commands import Origin, commands
from flashbone.compare.config import ComparisonConfig, check, listed_methods
from flashbone.compare.methods import METHODS
from flashbone.compare.processes import Ended, rehearsal, run_all
from flashbone.compare.progress import MethodProgress
from flashbone.compare.ray_tasks import check_ray, run_tasks
from flashbone.compare.reading import read_run
from flashbone.compare.results import FairnessRow, HeaderRow, RunRow, write_results
from flashbone.compare.runs import RunSpec, forget_contents, run_spec
from flashbone.compare.sizes import Budget, ParameterCounter, budget_of, match
from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import alone, make_folder
from flashbone.train.models import load_causal_lm, load_layout
from flashbone.train.recipe import is_pth
from flashbone.train.tasks import TASKS
from flashbone.tuner.model.skeleton import skeleton

log = logging.getLogger(__name__)


def compare(comparison: ComparisonConfig, origin: Origin, retry_failed: bool = False) -> Path:
    """Run what has not been run yet, and collect all results; returns the path of results.jsonl.

    A run that has ended is not repeated, whatever else has changed: so a comparison that was killed resumes, and one
    with more methods, rates or seeds runs only these. results.jsonl is written after each run.

    Args:
        comparison: What is compared.
        origin: Where it came from, for the commands in the results.
        retry_failed: Repeat failed runs.

    Raises:
        FlashboneError: the configuration is invalid, or the model cannot be read.
    """
    check(comparison)
    if comparison.jobs == "ray":
        check_ray()
    experiment = Experiment(comparison, origin)
    experiment.rehearse()
    with alone(experiment.folder):
        make_folder(experiment.runs)
        experiment.run(experiment.sweep(), retry_failed)
        experiment.run(experiment.repeats(), retry_failed)
        return experiment.write(finished=True)


class Experiment:
    """A comparison in its folder: OUTPUT/runs/NAME/ for each run, OUTPUT/results.jsonl.

    Args:
        comparison: What is compared.
        origin: Where it came from.
    """

    def __init__(self, comparison: ComparisonConfig, origin: Origin):
        self.comparison, self.origin = comparison, origin
        self.folder = Path(comparison.output)
        self.runs = self.folder / "runs"
        self.killed: dict[str, RunRow] = {}  # by the names of runs that ended without a result in this program
        forget_contents()
        self.budget, self.methods = plan(comparison)
        self._read()

    def sweep(self) -> list[RunSpec]:
        """Every learning rate of every method with the first seed. All methods have their turn before one has its
        second, so that what disturbs the machine for a while disturbs all alike."""
        by_method = [
            [self._spec(method, rate, self.comparison.seeds[0]) for rate in method.rates] for method in self._sized()
        ]
        return [spec for turn in zip(*by_method, strict=True) for spec in turn]

    def repeats(self) -> list[RunSpec]:
        """The other seeds at the rates that were chosen, in the same order."""
        chosen = [(method, method.chosen) for method in self._sized() if method.chosen is not None]
        return [self._spec(method, rate, seed) for seed in self.comparison.seeds[1:] for method, rate in chosen]

    def rehearse(self) -> None:
        """Read the arguments and the data as all runs will, in a process of its own, before anything is written.

        Raises:
            ConfigError: what would fail in each of them.
        """
        missing = [spec for spec in [*self.sweep(), *self.repeats()] if self._result(spec) is None]
        if missing and (problem := rehearsal(missing[0])):
            raise ConfigError(problem)

    def run(self, wanted: list[RunSpec], retry_failed: bool = False) -> None:
        """Run those of these that have no result yet, or that failed and are to be tried again."""
        for spec in wanted if retry_failed else ():
            if (result := self._result(spec)) is not None and result.status == "failed":
                self._result_file(spec).unlink()
        self._read()
        # Entries with equal settings share a run.
        wanted = list({spec.name: spec for spec in wanted}.values())
        missing = [spec for spec in wanted if self._result(spec) is None]
        if len(missing) < len(wanted):
            log.info("%d of %d runs have results already", len(wanted) - len(missing), len(wanted))
        began = time.perf_counter()
        jobs = self.comparison.jobs
        all_ended = run_tasks(missing, self.runs) if jobs == "ray" else run_all(missing, self.runs, jobs)
        for number, ended in enumerate(all_ended, 1):
            outcome = self._take_up(ended)
            left = (time.perf_counter() - began) / number * (len(missing) - number)
            log.info("%d/%d %s, about %.0f s left", number, len(missing), outcome, left)
            self.write(finished=False)

    def write(self, finished: bool) -> Path:
        """results.jsonl as far as it goes."""
        typed = commands(self.comparison, self.methods, self.origin) if finished else {}
        rows = [method.method_row(self.comparison.seeds, typed.get(method.listed.label, {})) for method in self.methods]
        file = self.folder / "results.jsonl"
        write_results(
            [self._header(finished), *rows, *(run for method in self.methods for run in method.run_rows())], file
        )
        return file

    def _sized(self) -> list[MethodProgress]:
        return [method for method in self.methods if method.size is not None]

    def _spec(self, method: MethodProgress, rate: float, seed: int) -> RunSpec:
        assert method.size is not None
        return run_spec(self.comparison, method.listed, method.size.settings, rate, seed)

    def _result_file(self, spec: RunSpec) -> Path:
        return self.runs / spec.name / "result.json"

    def _result(self, spec: RunSpec) -> RunRow | None:
        return read_run(self._result_file(spec))

    def _read(self) -> None:
        """Read all results anew."""
        for method in self._sized():
            method.runs, method.chosen, method.error = {}, None, None
            for rate, seed in itertools.product(method.rates, self.comparison.seeds):
                spec = self._spec(method, rate, seed)
                if (row := self._result(spec) or self.killed.get(spec.name)) is not None:
                    method.runs[rate, seed] = row
            method.choose(self.comparison.seeds[0])

    def _take_up(self, ended: Ended) -> str:
        """Read the result of one run, and describe it. A run without a result is repeated by the next comparison."""
        spec = ended.spec
        result = self._result(spec)
        if result is None:
            cause = f"by signal {ended.signal}" if ended.signal else "without a result"
            hint = " (out of memory?)" if ended.signal == 9 else ""
            error = f"its process ended {cause}{hint}; see {self.runs / spec.name / 'log.txt'}"
            result = self.killed[spec.name] = spec.row("failed", error=error)
        self._read()
        name = f"{spec.label}, learning rate {spec.learning_rate:g}, seed {spec.seed}"
        if result.status == "failed" or result.held_out is None:
            return f"{name}: failed: {result.error}"
        losses = result.held_out.loss
        first, last = (math.nan if loss is None else loss for loss in (losses[0], losses[-1]))
        return f"{name}: held-out loss {first:.4g} -> {last:.4g} ({ended.seconds:.0f} s)"

    def _header(self, finished: bool) -> HeaderRow:
        comparison, good = self.comparison, [run for method in self.methods for run in method.finished_runs]
        places = [run.about for run in good if run.about is not None]
        made = about.combined(places or [about.this_process(about.device_of(comparison.training))])
        rows = good[0].rows if good else {"train": 0, "held_out": 0, "test": 0}
        is_complete = all(method.status(comparison.seeds) != "unfinished" for method in self.methods)
        return HeaderRow(
            version=1,
            name=Path(self.origin.config).stem,
            config=self.origin.config,
            model=comparison.model,
            task=comparison.task,
            metric=comparison.test_metric,
            higher_is_better=comparison.test_metric != "loss",
            data={"path": comparison.data.path, **{f"{name}_rows": count for name, count in rows.items()}},
            budget={"parameters": self.budget.parameters, "from": self.budget.origin},
            tolerance=comparison.tolerance,
            steps=good[0].steps if good else 0,
            epochs=good[0].epochs if good else 0.0,
            seeds=tuple(comparison.seeds),
            jobs=comparison.jobs,
            command=self.origin.command(),
            fairness=FairnessRow(fairness.CHECKED, tuple(fairness.problems(comparison, self.methods))),
            finished=finished and is_complete,
            **dataclasses.asdict(made),
        )


def plan(comparison: ComparisonConfig) -> tuple[Budget, list[MethodProgress]]:
    """The methods with their sizes; one whose size cannot be determined has an error instead.

    Raises:
        ConfigError: the budget is invalid, or the model does not exist.
    """
    counter = ParameterCounter(_skeleton(comparison), comparison.target_modules, TASKS[comparison.task].task_type)
    budget = budget_of(comparison.budget, counter)
    # A share of the budget by which any two methods are within the tolerance of each other.
    around = comparison.tolerance / (2 + comparison.tolerance)
    methods = []
    for listed in listed_methods(comparison):
        method = MethodProgress(listed)
        try:
            method.size = match(METHODS[listed.method], listed.settings, budget.parameters, counter, around)
        except FlashboneError as error:
            method.error = str(error)
            log.warning("%s: left out: %s", listed.label, error)
        methods.append(method)
    return budget, methods


def _skeleton(comparison: ComparisonConfig) -> nn.Module:
    """The model without its weights; or with them, where its file holds no configuration."""
    if is_pth(comparison.model) or comparison.model.endswith(".gguf"):
        return load_causal_lm(comparison.model, torch.float32)
    if comparison.task == "classification":  # what the checkpoint lacks is trained whole, and not adapted
        return load_layout(comparison.model)
    return skeleton(comparison.model, task_type=TASKS[comparison.task].task_type)
