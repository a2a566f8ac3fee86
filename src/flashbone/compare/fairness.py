"""Whether all methods had the same conditions: checked on what the runs recorded, in every comparison."""

from collections.abc import Sequence

from flashbone.compare.config import ComparisonConfig
from flashbone.compare.progress import MethodProgress

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


def problems(comparison: ComparisonConfig, methods: Sequence[MethodProgress]) -> list[str]:
    """The conditions that were not the same for all methods, one line each."""
    lines = [*_unlike_runs(methods), *_unlike_sizes(comparison, methods)]
    runs = [run for method in methods for run in method.finished_runs]
    for part, did in (("learned", "learned"), ("held_out", "held out")):
        if count := max((run.overlap[part] for run in runs), default=0):
            lines.append(f"{count} of the test rows are also {did}, word for word")
    places = [run.about for run in runs if run.about is not None]
    for name in ("device", "hardware"):
        if len(kinds := sorted({getattr(place, name) for place in places})) > 1:
            lines.append(f"runs were made on different {name}: {'; '.join(kinds)}")
    versions = [set(place.versions.items()) for place in places]
    if unlike := sorted({name for place in versions for name, _ in set.union(*versions) - place}):
        lines.append(f"runs were made with different versions of {', '.join(unlike)}")
    return lines


def _unlike_runs(methods: Sequence[MethodProgress]) -> list[str]:
    """Runs with the same seed have to have learned the same."""
    lines = []
    runs = [(method.listed.label, run) for method in methods for run in method.finished_runs]
    for seed in sorted({run.seed for _, run in runs}):
        (first_label, first), *others = [(label, run) for label, run in runs if run.seed == seed]
        for name, words in _SAME.items():
            unlike = dict.fromkeys(label for label, run in others if getattr(run, name) != getattr(first, name))
            if unlike:
                lines.append(f"seed {seed}: {', '.join(unlike)} {words} than {first_label}")
    return lines


def _unlike_sizes(comparison: ComparisonConfig, methods: Sequence[MethodProgress]) -> list[str]:
    lines = []
    matched = [(method, method.size.adapter_parameters) for method in methods if method.size and method.size.matched]
    sizes = {method.listed.label: planned for method, planned in matched}
    if sizes and max(sizes.values()) > (1 + comparison.tolerance) * min(sizes.values()):
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        lines.append(f"{large} has {sizes[large]:,} parameters, {small} {sizes[small]:,}: too far apart")
    for method, planned in matched:
        for trained in {run.adapter_parameters for run in method.finished_runs} - {planned}:
            lines.append(f"{method.listed.label}: {trained:,} parameters trained, {planned:,} were planned")
    return lines
