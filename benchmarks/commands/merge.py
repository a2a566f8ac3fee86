"""Merging an adapter into a live model and out of it, and into a checkpoint on disk beside a copy of its files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.cases import ROOT, Setting
from benchmarks.errors import BenchmarkError
from benchmarks.methods import CURRENT
from benchmarks.rounds import Plan, Sample, interleave, progress
from benchmarks.rows import Row
from benchmarks.run import Run

METHODS = ("bone", "bat-col", "bat-row", "miss")


def measure(run: Run) -> list[Row]:
    """The rows of a part."""
    r = 16 if run.options.quick else 64
    if run.part == "command":
        return _command(run, r)
    settings = [Setting(name, r) for name in run.options.pick(METHODS)]
    return run.measure(run.case("merge", {"model": run.model}), settings, floor=Setting("lora", r))


def _command(run: Run, r: int) -> list[Row]:
    names = ("copy", "merge-command")
    with tempfile.TemporaryDirectory() as scratch:
        case = run.case("load", {"model": run.model}, scratch=scratch)
        about = run.prepare(case, Setting("bone", r))
        base, out = Path(scratch, "model"), Path(scratch, "out")
        merge = [sys.executable, "-m", "flashbone", "merge", str(base), str(Path(scratch, "bone")), str(out)]
        commands = [["cp", "-r", str(base), str(out)], merge]
        # The test of the benchmarks has no time for more starts of the command.
        plan = Plan(1, 0) if run.options.quick else run.plan
        with progress("merge command", len(commands) * (plan.warmup + plan.rounds)) as tick:
            figures = interleave([_timed(c, out, run.options.threads) for c in commands], plan, tick)
    samples = [
        Sample(Setting(name, r if name == "merge-command" else 0, 1), CURRENT, about, values)
        for name, values in zip(names, figures, strict=True)
    ]
    return run.rows(samples, case, "copy")


def _timed(command: list[str], out: Path, threads: int) -> Callable[[], dict[str, float]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def repetition() -> dict[str, float]:
        os.sync()  # What the one before has left to write is not this one's work.
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        elapsed_ms = (time.perf_counter() - start) * 1e3
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
        shutil.rmtree(out)
        return {"command_ms": elapsed_ms}

    return repetition
