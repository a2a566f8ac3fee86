"""What the runs left, brought together: the learning rate that each method gets, and the lines of results.jsonl."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashbone.compare.config import Comparison, Entry
from flashbone.compare.jobs import Job
from flashbone.compare.methods import METHODS
from flashbone.compare.sizes import Sized
from flashbone.errors import ConfigError
from flashbone.evaluate.results import finite
from flashbone.files.outputs import write_text

FIGURES = (
    "steps",
    "epochs",
    "tokens",
    "digest",
    "train",
    "held_out",
    "test",
    "test_scores",
    "test_weights",
    "step_ms",
    "train_s",
    "startup_s",
    "load_s",
    "peak_mib",
    "peak_of",
    "above_model_mib",
    "adapter_bytes",
    "grad_norm_first",
)


@dataclass
class Compared:
    """A method of a comparison.

    Attributes:
        entry: as it is listed.
        sized: its size; None where it could not be found, which `error` tells.
        runs: those that have ended: (learning rate, seed) -> the result.
        chosen: its learning rate, once all have been tried.
        error: why it has no figures.
    """

    entry: Entry
    sized: Sized | None = None
    runs: dict[tuple[float, int], dict[str, Any]] = field(default_factory=dict)
    chosen: float | None = None
    error: str | None = None

    @property
    def at_edge(self) -> str | None:
        """Where the chosen rate is the lowest or the highest of three or more, a better one may lie beyond."""
        rates = self.entry.learning_rates
        if self.chosen is None or len(rates) < 3:
            return None
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.chosen)

    def choose(self, seed: int) -> None:
        """Choose among the rates that were all tried with this seed, by the held-out rows after training."""
        tried = [(rate, self.runs.get((rate, seed))) for rate in self.entry.learning_rates]
        if any(result is None for _, result in tried):
            return
        good = [(_last_loss(result), rate) for rate, result in tried if result and result["status"] == "ok"]
        if good:
            self.chosen = min(good)[1]
        else:
            self.error = next(result["error"] for _, result in tried if result)

    def status(self, seeds: Sequence[int]) -> str:
        """ok, failed, or unfinished."""
        if self.error is not None:
            return "failed"
        runs = [self.runs.get((self.chosen, seed)) for seed in seeds] if self.chosen is not None else [None]
        if any(run is None for run in runs):
            return "unfinished"
        # A method that fails with one of its seeds has no figure: those with which it went well would flatter it.
        return "ok" if all(run["status"] == "ok" for run in runs if run) else "failed"


def _last_loss(result: dict[str, Any]) -> float:
    """The held-out loss at the end; of classifiers, too, since the accuracy on a few rows is a matter of luck."""
    loss = result["held_out"]["loss"][-1]
    return math.inf if loss is None else loss


def read_result(folder: Path, job: Job) -> dict[str, Any] | None:
    """What a run left in its folder; None where it has not come to its end."""
    file = folder / job.name / "result.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise ConfigError(f"{file}: is no JSON; delete it, and the run is done again") from None


def lines(
    header: Mapping[str, Any], comparison: Comparison, methods: Sequence[Compared], commands: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """All lines of results.jsonl: the header, the methods, their runs."""
    rows = [_method(one, comparison, commands) for one in methods]
    rows += [_run(one, rate, seed, result) for one in methods for (rate, seed), result in sorted(one.runs.items())]
    return [dict(header), *rows]


def write(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write results.jsonl whole or not at all; what is not finite becomes null, since JSON has no word for it."""
    write_text(file, "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def _method(one: Compared, comparison: Comparison, commands: Mapping[str, Any]) -> dict[str, Any]:
    entry, sized, method = one.entry, one.sized, METHODS[one.entry.method]
    size = {"size": "", "matched": False, "fixed": False, "off_budget": None}
    if sized is not None:
        trainable = _measured(one, "trainable_parameters") or sized.trainable_parameters  # the classes were not known
        size = {
            "size": sized.size,
            "matched": sized.matched,
            "fixed": sized.fixed,
            "adapter_parameters": sized.adapter_parameters,
            "trainable_parameters": trainable,
            "total_parameters": sized.total_parameters + trainable - sized.trainable_parameters,
            "off_budget": None if sized.off_budget is None else round(sized.off_budget, 5),
        }
    status = one.status(comparison.seeds)
    counted = [one.runs.get((one.chosen, seed)) for seed in comparison.seeds] if one.chosen is not None else []
    failed = [(seed, run) for seed, run in zip(comparison.seeds, counted, strict=False) if run and run["error"]]
    error = one.error or "; ".join(f"seed {seed}: {run['error']}" for seed, run in failed) or None
    return {
        "kind": "method",
        "method": entry.label,
        "title": method.title if entry.label == entry.method else entry.label,
        "peft_type": method.peft_type,
        "settings": {**entry.settings, **(sized.settings if sized else {})},
        "bound": method.is_bound,
        **size,
        "learning_rates": list(entry.learning_rates),
        "chosen": one.chosen,
        "at_edge": one.at_edge,
        "status": status,
        "error": error,
        **commands.get(entry.label, {"rerun": None, "train": None}),
    }


def _measured(one: Compared, name: str) -> Any:
    return next((run[name] for run in one.runs.values() if run["status"] == "ok"), None)


def _run(one: Compared, rate: float, seed: int, result: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "kind": "run",
        "method": one.entry.label,
        "learning_rate": rate,
        "seed": seed,
        "counted": rate == one.chosen,
        "status": result["status"],
        "error": result.get("error"),
    }
    return row | {name: result[name] for name in FIGURES if name in result}
