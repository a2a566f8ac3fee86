"""A comparison run from its configuration, and its rows without what no two runs have in common."""

import json
from pathlib import Path

from flashbone.compare.commands import Origin
from flashbone.compare.config import load_comparison
from flashbone.compare.run import compare

TIMES = {"step_ms", "train_s", "startup_s", "load_s", "peak_mib", "above_model_mib", "seconds"}


def results(config: Path, *overrides: str) -> list[dict]:
    """The lines that the comparison comes to."""
    return lines(compare(load_comparison(config, list(overrides)), Origin(str(config), overrides)))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(value):
    """Without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMES}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def of(rows: list[dict], kind: str) -> list[dict]:
    return untimed([row for row in rows if row["kind"] == kind])
