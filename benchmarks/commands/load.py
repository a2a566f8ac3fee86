"""Importing the packages in fresh processes, and loading an adapter's folder into a model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks.cases import ROOT, Setting
from benchmarks.errors import BenchmarkError
from benchmarks.methods import CURRENT
from benchmarks.rounds import Plan, Sample, interleave, progress
from benchmarks.rows import Row
from benchmarks.run import Run

METHODS = ("bone", "bat-col", "miss")
TIMED_IMPORT = "import time; start = time.perf_counter(); import {}; print((time.perf_counter() - start) * 1e3)"
IMPORTS = {"import-peft": "peft", "import-flashbone": "flashbone", "import-both": "flashbone, peft"}


def measure(run: Run) -> list[Row]:
    """The rows of a part."""
    if run.part == "import":
        return _imports(run)
    r = 16 if run.options.quick else 64
    settings = [Setting(name, r) for name in run.options.pick(METHODS)]
    with tempfile.TemporaryDirectory() as scratch:
        case = run.case("load", {"model": run.model}, scratch=scratch)
        return run.measure(case, settings, floor=Setting("lora", r))


def _imports(run: Run) -> list[Row]:
    names = list(IMPORTS)
    plan = Plan(1, 0) if run.options.quick else run.plan
    with progress("import", len(names) * (plan.warmup + plan.rounds)) as tick:
        figures = interleave([_import(IMPORTS[name], run.options.threads) for name in names], plan, tick)
    case = run.case("import", {})
    about = run.about(case)
    samples = [Sample(Setting(n, 0, 0), CURRENT, about, f) for n, f in zip(names, figures, strict=True)]
    return run.rows(samples, case, "import-peft")


def _import(modules: str, threads: int) -> Callable[[], dict[str, float]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", TIMED_IMPORT.format(modules)]

    def repetition() -> dict[str, float]:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"import {modules}: {done.stderr.strip().splitlines()[-1]}")
        return {"import_ms": float(done.stdout)}

    return repetition
