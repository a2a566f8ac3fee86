"""One run of a benchmark: the op tests first, then part after part, each saved as soon as it is measured."""

from __future__ import annotations

import datetime
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from benchmarks import rows
from benchmarks.cases import FROZEN, MODEL, MODEL_OF_FP32, ROOT, Case, Setting
from benchmarks.errors import BenchmarkError, UsageError
from benchmarks.methods import CURRENT
from benchmarks.options import SPECS, Options
from benchmarks.rounds import Plan, Sample, in_processes, in_workers, rows_of
from benchmarks.rows import Row
from benchmarks.workers import Pool

COUNTED = ("alive",)  # parts that are the same on every machine


@dataclass
class Run:
    """What the parts of a benchmark measure with."""

    options: Options
    pool: Pool
    part: str
    dtype: str
    commit: str
    date: str

    @property
    def plan(self) -> Plan:
        """How often every case is measured."""
        return Plan(self.options.rounds, self.options.warmup)

    @property
    def model(self) -> str:
        """The language model, a name of `MODELS`."""
        return self.options.model or (MODEL_OF_FP32 if self.dtype == "float32" else MODEL)

    def case(self, kind: str, shape: dict[str, Any], **fields: Any) -> Case:
        """A case on the run's device, in its dtype."""
        return Case(kind, shape, self.dtype, self.options.device, **fields)

    def measure(
        self,
        case: Case,
        settings: list[Setting],
        floor: Setting = FROZEN,
        own_process: bool = False,
        plan: Plan | None = None,
    ) -> list[Row]:
        """The rows of settings on a case; none where there is nothing beside the floor."""
        if not settings:
            return []
        measure = in_processes if own_process else in_workers
        measured = measure(self.pool, case, settings, floor, plan or self.plan)
        return self.rows(measured, case, floor.method)

    def about(self, case: Case) -> dict[str, Any]:
        """Device and versions, for what is not measured in a worker."""
        (worker,) = self.pool.get(CURRENT)
        return {"versions": worker.versions, **worker.ask("device", device=case.device)}

    def prepare(self, case: Case, setting: Setting) -> dict[str, Any]:
        """Have a worker make the files of a case; device and versions."""
        (worker,) = self.pool.get(CURRENT)
        worker.ask("open", case=case.to_dict())
        worker.ask("prepare", setting.label, setting=vars(setting))
        return self.about(case)

    def rows(self, samples: list[Sample], case: Case, floor: str) -> list[Row]:
        """Samples as rows of this run."""
        common = {
            "benchmark": self.options.benchmark,
            "part": self.part,
            "shape": case.shape,
            "dtype": case.dtype,
            "commit": self.commit,
            "date": self.date,
        }
        threads = self.options.threads
        return rows_of(samples, floor, common, f", {threads} thread{'s' if threads > 1 else ''}")


def run(options: Options, pool: Pool, is_checked: bool = False) -> list[Row]:
    """Measure, save and print; the rows.

    Args:
        options: What was asked for.
        pool: Where it runs.
        is_checked: Whether the ops were compared with the oracle already.

    Raises:
        BenchmarkError: the op tests fail, or a measurement.
    """
    if not (options.quick or is_checked):
        check_ops(SPECS[options.benchmark].tests)
    command = import_module(f"benchmarks.commands.{options.benchmark}")
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    target = options.out
    if target is None and not options.quick and options.model != "tiny":
        target = rows.RESULTS / f"{options.benchmark}.jsonl"
    measured: list[Row] = []
    is_emulated = _emulates_bf16(options, pool)
    for part, dtype in itertools.product(options.parts, options.dtypes):
        if is_emulated and dtype != "float32" and part not in COUNTED:
            continue
        found = command.measure(Run(options, pool, part, dtype, rows.current_commit(), now))
        if target is not None and found:
            rows.save(target, found)
        print_rows(part, found)
        measured += found
    if not measured:
        raise UsageError(f"{options.benchmark}: none of the methods asked for is measured here")
    return measured


def _emulates_bf16(options: Options, pool: Pool) -> bool:
    """Whether bf16 is left out: on a CPU without instructions for it a product takes ten times as long as in fp32, and
    beside that every adapter looks cheap."""
    if options.quick or options.dtype_is_asked_for or options.device != "cpu" or options.dtypes == ("float32",):
        return False
    (worker,) = pool.get(CURRENT)
    if worker.ask("device", device="cpu")["has_bf16"]:
        return False
    print("benchmarks: this CPU has no bf16 instructions; --dtype asks for bf16 all the same", file=sys.stderr)
    return True


def check_ops(tests: str) -> None:
    """Numbers only after the op tests pass: a fast wrong answer is no figure.

    Raises:
        BenchmarkError: they fail.
    """
    command = [sys.executable, "-m", "pytest", "-q", tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
        raise BenchmarkError(f"nothing is measured: the op tests fail ({last.strip('= ')}); run pytest -q {tests}")


def print_rows(part: str, found: list[Row]) -> None:
    """A part's rows as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    if not found:
        return
    first = found[0]
    table = Table(title=f"{first.benchmark} {part}: {first.device}, commit {first.commit}", title_justify="left")
    for name in ("method", "r", "adapters", "shape", "dtype", "metric"):
        table.add_column(name)
    for name in ("median", "q1", "q3", "n"):
        table.add_column(name, justify="right")
    for row in found:
        shape = " ".join(str(value) for value in row.shape.values())
        figures = [f"{value:.4g}" for value in (row.median, row.q1, row.q3)]
        table.add_row(row.method, str(row.r), str(row.adapters), shape, row.dtype, row.metric, *figures, str(row.n))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
