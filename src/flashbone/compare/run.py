"""A comparison from its configuration to results.jsonl: sizes, a sweep of learning rates, repeats with other seeds."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashbone.compare import about, fairness, jobs, results
from flashbone.compare.commands import Origin, commands
from flashbone.compare.config import Comparison, check, entries
from flashbone.compare.jobs import Job
from flashbone.compare.methods import METHODS
from flashbone.compare.processes import Ended, rehearsal, run_all
from flashbone.compare.results import Compared
from flashbone.compare.sizes import Budget, budget_of, match
from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import alone, make_folder
from flashbone.train.models import load_causal_lm
from flashbone.train.recipe import TASK_TYPES, is_pth
from flashbone.tuner.model.skeleton import skeleton

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"


def compare(comparison: Comparison, origin: Origin, retry_failed: bool = False) -> Path:
    """Run what has not been run yet, and bring all together; returns the path of results.jsonl.

    A run that has ended is not done again, whatever else has changed: so a comparison that was killed goes on, and one
    with more methods, rates or seeds does only these. results.jsonl is written after each run.

    Args:
        comparison: What is compared.
        origin: Where it came from, for the commands in the results.
        retry_failed: Do failed runs again.

    Raises:
        FlashboneError: the configuration makes no sense, or the model cannot be read.
    """
    check(comparison)
    experiment = Experiment(comparison, origin)
    experiment.rehearse()
    with alone(experiment.folder):
        make_folder(experiment.runs)
        experiment.do(experiment.sweep(), retry_failed)
        experiment.do(experiment.repeats(), retry_failed)
        return experiment.write(finished=True)


class Experiment:
    """A comparison in its folder: OUTPUT/runs/NAME/ for each run, OUTPUT/results.jsonl.

    Args:
        comparison: What is compared.
        origin: Where it came from.
    """

    def __init__(self, comparison: Comparison, origin: Origin):
        self.comparison, self.origin = comparison, origin
        self.folder = Path(comparison.output)
        self.runs = self.folder / "runs"
        self.lost: dict[tuple[str, float, int], dict[str, Any]] = {}  # runs that a signal ended, in this program
        jobs.forget_contents()
        self.budget, self.methods = plan(comparison)
        self._read()

    def sweep(self) -> list[Job]:
        """Every learning rate of every method with the first seed."""
        return jobs.sweep(self.comparison, self._sizes())

    def repeats(self) -> list[Job]:
        """The other seeds, once the rates have been chosen."""
        chosen = {one.entry.label: one.chosen for one in self.methods if one.chosen is not None}
        return jobs.repeats(self.comparison, self._sizes(), chosen)

    def rehearse(self) -> None:
        """Read the arguments and the data as all runs will, in a process of its own, before anything is written.

        Raises:
            ConfigError: what would fail in each of them.
        """
        missing = [job for job in [*self.sweep(), *self.repeats()] if results.read_result(self.runs, job) is None]
        if missing and (problem := rehearsal(missing[0])):
            raise ConfigError(problem)

    def do(self, wanted: list[Job], retry_failed: bool = False) -> None:
        """Run those of these that have no result yet, or a failure that is to be tried again."""
        for job in wanted if retry_failed else ():
            if (result := results.read_result(self.runs, job)) is not None and result["status"] == "failed":
                (self.runs / job.name / "result.json").unlink()
        self._read()
        # Two entries may come to the same run, by settings that are equal: it is done once, for both.
        wanted = list({job.name: job for job in wanted}.values())
        missing = [job for job in wanted if results.read_result(self.runs, job) is None]
        if len(missing) < len(wanted):
            log.info("%d of %d runs are there already", len(wanted) - len(missing), len(wanted))
        began = time.perf_counter()
        for number, ended in enumerate(run_all(missing, self.runs, self.comparison.jobs), 1):
            self._note(ended)
            left = (time.perf_counter() - began) / number * (len(missing) - number)
            log.info("%d/%d %s, about %.0f s left", number, len(missing), self._words(ended), left)
            self.write(finished=False)

    def write(self, finished: bool) -> Path:
        """results.jsonl as far as it goes."""
        told = commands(self.comparison, self.methods, self.origin) if finished else {}
        rows = results.lines(self._header(finished), self.comparison, self.methods, told)
        results.write(rows, self.folder / RESULTS)
        return self.folder / RESULTS

    def _sizes(self) -> jobs.Sizes:
        return [(one.entry, one.sized.settings) for one in self.methods if one.sized is not None]

    def _read(self) -> None:
        """Take up what the runs left, and nothing that was thought before."""
        for one in self.methods:
            if one.sized is None:
                continue
            rates, seeds = one.entry.learning_rates, self.comparison.seeds
            one.chosen = one.error = None
            one.runs = {}
            for rate, seed in [(rate, seed) for rate in rates for seed in seeds]:
                if lost := self.lost.get((one.entry.label, rate, seed)):
                    one.runs[rate, seed] = lost
                job = jobs.job(self.comparison, one.entry, one.sized.settings, rate, seed)
                if (found := results.read_result(self.runs, job)) is not None:
                    one.runs[rate, seed] = found
            one.choose(seeds[0])

    def _note(self, ended: Ended) -> None:
        """Take up one run; one that a signal ended has left nothing, and is done again the next time."""
        job = ended.job
        if results.read_result(self.runs, job) is None:
            why = f"by signal {ended.signal}" if ended.signal else "without a result"
            hint = " (out of memory?)" if ended.signal == 9 else ""
            error = f"its process ended {why}{hint}; see {self.runs / job.name / 'log.txt'}"
            self.lost[job.label, job.learning_rate, job.seed] = {"status": "failed", "error": error}
        self._read()

    def _words(self, ended: Ended) -> str:
        job = ended.job
        name = f"{job.label}, learning rate {job.learning_rate:g}, seed {job.seed}"
        found = next(one.runs for one in self.methods if one.entry.label == job.label)[job.learning_rate, job.seed]
        if found["status"] == "failed":
            return f"{name}: failed: {found['error']}"
        loss = found["held_out"]["loss"]
        return f"{name}: held-out loss {loss[0]:.4g} -> {loss[-1]:.4g} ({ended.seconds:.0f} s)"

    def _header(self, finished: bool) -> dict[str, Any]:
        comparison, runs = self.comparison, [run for one in self.methods for run in one.runs.values()]
        good = [run for run in runs if run["status"] == "ok"]
        some = good[0] if good else {"rows": {"train": 0, "held_out": 0, "test": 0}, "steps": 0, "epochs": 0.0}
        made = about.together([run["about"] for run in good]) if good else about.here(comparison)
        return {
            "kind": "comparison",
            "version": 1,
            "name": Path(self.origin.config).stem,
            "config": self.origin.config,
            "model": comparison.model,
            "task": comparison.task,
            "metric": comparison.test_metric,
            "higher_is_better": comparison.test_metric != "loss",
            "data": {"path": comparison.data.path, **{f"{name}_rows": count for name, count in some["rows"].items()}},
            "budget": {"parameters": self.budget.parameters, "from": self.budget.origin},
            "tolerance": comparison.tolerance,
            "steps": some["steps"],
            "epochs": some["epochs"],
            "seeds": list(comparison.seeds),
            "jobs": comparison.jobs,
            **made,
            "command": self.origin.command(),
            "fairness": {
                "checked": list(fairness.CHECKED),
                "problems": fairness.problems(comparison, self.methods),
            },
            "finished": finished and all(one.status(comparison.seeds) != "unfinished" for one in self.methods),
        }


def plan(comparison: Comparison) -> tuple[Budget, list[Compared]]:
    """The methods with their sizes; one whose size cannot be found has an error instead.

    Raises:
        ConfigError: the budget makes no sense, or there is no such model.
    """
    build, task_type = model_builder(comparison), TASK_TYPES[comparison.task]
    spec = comparison.budget
    budget = budget_of(spec, build, comparison.target_modules, task_type)
    around = comparison.tolerance / (
        2 + comparison.tolerance
    )  # of the budget, so that any two are within the tolerance
    methods = []
    for entry in entries(comparison):
        one = Compared(entry)
        targets = comparison.target_modules
        try:
            one.sized = match(
                METHODS[entry.method], budget.parameters, build, targets, task_type, entry.settings, around
            )
        except FlashboneError as error:
            one.error = str(error)
            log.warning("%s: left out: %s", entry.label, error)
        methods.append(one)
    return budget, methods


def model_builder(comparison: Comparison) -> Callable[[], Any]:
    """Makes the model without its weights, or, of files that hold no configuration, the model."""
    import torch

    if is_pth(comparison.model) or comparison.model.endswith(".gguf"):
        model = load_causal_lm(comparison.model, torch.float32)
        return lambda: model
    return lambda: skeleton(comparison.model, task_type=TASK_TYPES[comparison.task])
