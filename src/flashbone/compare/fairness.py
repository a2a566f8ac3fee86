"""Whether all methods were given the same: checked on what the runs recorded, in every comparison."""

from collections.abc import Sequence

from flashbone.compare.config import Comparison
from flashbone.compare.results import Compared

CHECKED = (
    "same rows in the same order",
    "same number of steps and tokens",
    "same number of learning rates",
    "sizes of matched adapters within the tolerance",
    "no test row learned or held out",
    "same versions, hardware and numbers of threads",
)
_SAME = {"digest": "learned other rows, or in another order", "tokens": "learned other numbers of tokens",
         "steps": "took other numbers of steps"}  # fmt: skip


def problems(comparison: Comparison, methods: Sequence[Compared]) -> list[str]:
    """What was not the same for all, one line each; none when all was."""
    found = [*_unlike_runs(methods), *_unlike_sizes(comparison, methods)]
    runs = [run for one in methods for run in one.runs.values() if run["status"] == "ok"]
    for part, did in (("learned", "learned"), ("held_out", "held out")):
        if count := max((run["overlap"][part] for run in runs), default=0):
            found.append(f"{count} of the test rows are also {did}, word for word")
    for what in ("device", "hardware"):
        if len(kinds := sorted({run["about"][what] for run in runs})) > 1:
            found.append(f"runs were made on different {what}: {'; '.join(kinds)}")
    versions = [set(run["about"]["versions"].items()) for run in runs]
    if unlike := sorted({name for one in versions for name, _ in set.union(*versions) - one}):
        found.append(f"runs were made with different versions of {', '.join(unlike)}")
    return found


def _unlike_runs(methods: Sequence[Compared]) -> list[str]:
    """Runs with the same seed have to have learned the same."""
    found = []
    seeds = sorted({seed for one in methods for _, seed in one.runs})
    for seed in seeds:
        runs = [
            (one.entry.label, run)
            for one in methods
            for (_, of), run in one.runs.items()
            if of == seed and run["status"] == "ok"
        ]
        for name, words in _SAME.items():
            values = {run[name] for _, run in runs}
            if len(values) > 1:
                first = runs[0][1][name]
                others = dict.fromkeys(label for label, run in runs if run[name] != first)
                found.append(f"seed {seed}: {', '.join(others)} {words} than {runs[0][0]}")
    return found


def _unlike_sizes(comparison: Comparison, methods: Sequence[Compared]) -> list[str]:
    sizes = {one.entry.label: one.sized.adapter_parameters for one in methods if one.sized and one.sized.matched}
    found = []
    if sizes and max(sizes.values()) > (1 + comparison.tolerance) * min(sizes.values()):
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        found.append(f"{large} has {sizes[large]:,} parameters, {small} {sizes[small]:,}: too far apart")
    for one in methods:
        counts = {run["adapter_parameters"] for run in one.runs.values() if run["status"] == "ok"}
        if one.sized and one.sized.matched and counts - {one.sized.adapter_parameters}:
            trained, planned = max(counts), one.sized.adapter_parameters
            found.append(f"{one.entry.label}: {trained:,} parameters trained, {planned:,} were planned")
    return found
