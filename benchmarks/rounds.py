"""Round after round: every method once a round in a new order, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Case, Setting
from benchmarks.methods import METHODS
from benchmarks.rows import Row, paired_ratios, spread
from benchmarks.workers import Pool, Worker

Repetition = Callable[[], dict[str, float]]


@dataclass
class Sample:
    """The figures of one setting, by metric and round.

    Attributes:
        setting: What was measured.
        source: Where: only samples of one source (a worker) are compared with each other.
        about: `device` and `versions` of the source.
        figures: metric -> one value a round.
    """

    setting: Setting
    source: str
    about: dict[str, Any]
    figures: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How often: `rounds` are counted, `warmup` rounds before them are not."""

    rounds: int
    warmup: int
    seed: int = 0


def interleave(repetitions: Sequence[Repetition], plan: Plan, tick: Callable[[], None]) -> list[dict[str, list[float]]]:
    """Do each repetition once a round, in an order that is shuffled for every round.

    Returns:
        For each repetition, metric -> one value for every counted round.
    """
    order = random.Random(plan.seed)
    indices = list(range(len(repetitions)))
    figures: list[dict[str, list[float]]] = [{} for _ in repetitions]
    for turn in range(plan.warmup + plan.rounds):
        order.shuffle(indices)
        for index in indices:
            measured = repetitions[index]()
            tick()
            if turn >= plan.warmup:
                for metric, value in measured.items():
                    figures[index].setdefault(metric, []).append(value)
    return figures


def in_workers(pool: Pool, case: Case, settings: list[Setting], floor: Setting, plan: Plan) -> list[Sample]:
    """Measure settings on a case, each in the worker of its method, and the floor in every worker."""
    placed = _placed(pool, settings, floor)
    total = len(placed) * (1 + plan.warmup + plan.rounds)
    with progress(f"{case.kind} {describe(case.shape)}".strip(), total) as tick:
        workers = {worker.name: worker for worker, _ in placed}
        about = {name: worker.ask("open", case=case.to_dict()) for name, worker in workers.items()}
        for worker, setting in placed:
            worker.ask("prepare", setting.label, setting=vars(setting))
            tick()
        repetitions = [
            lambda w=worker, s=setting: w.ask("measure", s.label, label=s.label)["figures"]
            for worker, setting in placed
        ]
        figures = interleave(repetitions, plan, tick)
    return [
        Sample(setting, worker.name, {**about[worker.name], "versions": worker.versions}, values)
        for (worker, setting), values in zip(placed, figures, strict=True)
    ]


def in_processes(pool: Pool, case: Case, settings: list[Setting], floor: Setting, plan: Plan) -> list[Sample]:
    """As `in_workers`, but each repetition in a new process."""
    placed = _placed(pool, settings, floor)
    samples = [Sample(setting, worker.name, {"versions": worker.versions}) for worker, setting in placed]

    def once(worker: Worker, sample: Sample) -> dict[str, float]:
        reply = worker.ask("once", sample.setting.label, case=case.to_dict(), setting=vars(sample.setting))
        sample.about["device"] = reply["device"]
        return reply["figures"]

    repetitions = [lambda w=worker, s=sample: once(w, s) for (worker, _), sample in zip(placed, samples, strict=True)]
    with progress(f"{case.kind} {describe(case.shape)}", len(placed) * (plan.warmup + plan.rounds)) as tick:
        for sample, values in zip(samples, interleave(repetitions, plan, tick), strict=True):
            sample.figures = values
    return samples


def _placed(pool: Pool, settings: list[Setting], floor: Setting) -> list[tuple[Worker, Setting]]:
    names = {METHODS[setting.method].worker for setting in settings} or {METHODS[floor.method].worker}
    workers = dict(zip(sorted(names), pool.get(*sorted(names)), strict=True))
    floors = [(worker, floor) for worker in workers.values()]
    return floors + [(workers[METHODS[s.method].worker], s) for s in settings if s != floor]


def rows_of(samples: list[Sample], floor: str, common: dict[str, Any], device_suffix: str) -> list[Row]:
    """Rows of a case: each figure, and beside it its relation to the floor of the same source.

    Times become ratios, paired by round; memory becomes what lies above the floor's median. A figure that the floor
    has not has no relation.
    """
    floors = {sample.source: sample for sample in samples if sample.setting.method == floor}
    rows = []
    for sample in samples:
        for metric, values in sample.figures.items():
            below = floors[sample.source].figures.get(metric)
            figures = {metric: values}
            if below is None:
                pass
            elif metric.endswith("_mib"):
                median = spread(below)["median"]
                figures["above_floor_mib"] = [value - median for value in values]
            else:
                figures[metric.removesuffix("_ms") + "_ratio"] = paired_ratios(values, below)
            rows += [
                Row(
                    **common,
                    **vars(sample.setting),
                    metric=name,
                    **spread(figure),
                    device=sample.about["device"] + device_suffix,
                    versions=sample.about["versions"],
                )
                for name, figure in figures.items()
            ]
    return rows


def describe(shape: dict[str, Any]) -> str:
    """A shape in a few words."""
    return ", ".join(f"{key} {value}" for key, value in shape.items())


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A line on stderr, on a terminal, while a case is measured; call what it yields after every piece of work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
