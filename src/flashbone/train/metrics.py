"""metrics.jsonl: what a run logs while it trains."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone.files.outputs import read_json_lines, write_text
from flashbone.files.records import from_json


@dataclass(frozen=True)
class LoggedStep:
    """A line of metrics.jsonl; the figures that the trainer logs follow under their own names, as numbers or null."""

    step: int
    tokens: int = 0  # learned from so far
    train_s: float = 0.0  # seconds in optimiser steps so far


class MetricsLog:
    """metrics.jsonl: one object for each log event, each step once however often the run was resumed."""

    def __init__(self, path: Path, keep_to_step: int | None = None):
        """Open the log, dropping what was logged after `keep_to_step` (a checkpoint's), or everything."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if keep_to_step is not None:
            rows = read_json_lines(path, after_kill=True)
            self.rows = [row for row in rows if from_json(LoggedStep, row, str(path)).step <= keep_to_step]

    def rewrite(self) -> None:
        """Make the file hold the kept rows and nothing else."""
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The held-out figures at a step."""
        return next((row for row in self.rows if row["step"] == step and "eval_loss" in row), None)

    def last(self, key: str, default: Any = None) -> Any:
        return next((row[key] for row in reversed(self.rows) if key in row), default)
