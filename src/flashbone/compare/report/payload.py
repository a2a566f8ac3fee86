"""What the page's charts are drawn from: one object of plain lists and numbers."""

from __future__ import annotations

import json
from typing import Any

from flashbone.compare.report import style, words
from flashbone.compare.report.costs import Band, band, spread
from flashbone.compare.report.results import ComparisonResults
from flashbone.compare.report.statistics import Ranking


def payload(ranking: Ranking) -> dict[str, Any]:
    """Curves, sweeps and points of every method that has any."""
    comparison = ranking.comparison
    methods = []
    for number, method in enumerate(comparison.methods):
        key = method.method
        runs = comparison.counted(key)
        estimate, peak = ranking.estimates.get(key), spread(comparison, key, "peak_mib")
        entry = {
            "key": key,
            "label": comparison.label(key),
            "best": key in ranking.tied,
            "colour": style.colour(number),
            "dash": style.dash(number),
            "train": _curve(band(runs, "train")),
            "held_out": _curve(band(runs, "held_out")),
            "sweep": sweep(comparison, key),
            "chosen": method.chosen,
            "peak_mib": peak and round(peak.mean, 1),
            "test": estimate and [estimate.mean, estimate.low, estimate.high],
        }
        if any(entry[name] for name in ("train", "held_out", "sweep", "test")):
            methods.append(entry)
    header = comparison.header
    return {
        "metric": words.metric(header),
        "percent": header.metric != "loss",
        "loss_unit": "nats per token" if header.task == "sft" else "cross-entropy",
        "methods": methods,
    }


def sweep(comparison: ComparisonResults, method: str) -> list[list[float]]:
    """Learning rates with the held-out loss at the end, on the first seed, where all rates were tried."""
    first = comparison.header.seeds[0] if comparison.header.seeds else None
    runs = [run for run in comparison.runs if run.method == method and run.status == "ok" and run.seed == first]
    points = [(run.learning_rate, run.last_held_out) for run in runs]
    return sorted([rate, loss] for rate, loss in points if rate is not None and loss is not None)


def _curve(curve: Band | None) -> dict[str, list[float | None]] | None:
    if curve is None:
        return None
    names = ("step", "seconds", "mean", "low", "high")
    return {name: [None if at is None else float(f"{at:.6g}") for at in getattr(curve, name)] for name in names}


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<`, `>` or `&`, so nothing can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
