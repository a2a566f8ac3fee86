"""The rows that benchmarks write: one figure of one method with its spread and what it depends on, in JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import ROOT
from benchmarks.errors import BenchmarkError

RESULTS = ROOT / "benchmarks" / "results"
# What a run and `tables` write; anything else that differs from the commit makes a row's commit "-dirty".
GENERATED = ("benchmarks/results", "docs/benchmarks.md", "docs/images")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        benchmark, part: What was run.
        method, r, adapters: The setting, as in `benchmarks.cases.Setting`.
        shape, dtype: The size of the work, as in `benchmarks.cases.Case`.
        metric: What the figure is; its unit is its ending: `_ms`, `_mib`, or `_ratio` (to the floor of that round).
        median, q1, q3, n: Of the rounds.
        per_round: The figure of each round, in order: rows of one run and process can be paired by round.
        commit: Short hash; "-dirty" where tracked or new files differ from it.
        date: Start of the run, UTC; the same in all rows of a run.
        device: Processor and number of threads.
        versions: Of Python and the packages that this method ran with.
    """

    benchmark: str
    part: str
    method: str
    r: int
    adapters: int
    shape: dict[str, Any]
    dtype: str
    metric: str
    median: float
    q1: float
    q3: float
    n: int
    per_round: list[float]
    commit: str
    date: str
    device: str
    versions: dict[str, str]

    @property
    def group(self) -> tuple[str, ...]:
        """What a later run of the same replaces as a whole."""
        return (self.benchmark, self.part, self.dtype, self.device, str(self.shape.get("model")))


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles, number and the values themselves, to six digits."""
    rounded = [float(f"{value:.6g}") for value in values]
    q1, median, q3 = statistics.quantiles(rounded, n=4, method="inclusive") if len(values) > 1 else rounded * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(values), "per_round": rounded}


def paired_ratios(values: list[float], floor: list[float]) -> list[float]:
    """Round by round, how many times the floor's figure; both are of one run, so that noise hits them alike."""
    return [value / below for value, below in zip(values, floor, strict=True)]


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    try:
        return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"{path}: holds something else than rows ({error}); measure again") from error


def save(path: Path, rows: list[Row]) -> None:
    """Put rows into a file in the place of earlier ones of their groups; the file is replaced as a whole."""
    groups = {row.group for row in rows}
    rows = [row for row in read(path) if row.group not in groups] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def current_commit() -> str:
    """Short hash of the checkout, with "-dirty" where it has changes; "unknown" outside of git."""
    excluded = [f":!{path}" for path in GENERATED]
    try:
        commit = _git("rev-parse", "--short", "HEAD").strip()
        return commit + ("-dirty" if _git("status", "--porcelain", "--", ".", *excluded).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
