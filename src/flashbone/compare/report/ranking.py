"""The ranking of a comparison's methods: who is best, who is tied, and how fast they learned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flashbone.compare.report.speed import Speeds, speeds
from flashbone.compare.report.statistics import DRAWS, Bootstrap, Difference, Estimate
from flashbone.compare.results import ComparisonResults


@dataclass(frozen=True)
class Ranking:
    """The methods matched in size from best to worst. Bounds and unmatched methods are compared with the best, but are
    not candidates.

    Attributes:
        results: What was measured.
        estimates: Test figures of all methods that have one.
        ranked: The candidates with a test figure, best first.
        tied: Those of them that cannot be told apart from the first, and the first.
        differences: The leads of the first over every other method.
    """

    results: ComparisonResults
    estimates: dict[str, Estimate]
    ranked: tuple[str, ...]
    tied: tuple[str, ...]
    differences: dict[str, Difference]

    @property
    def winner(self) -> str | None:
        """The best method, if there are others and none is tied with it."""
        return self.ranked[0] if len(self.ranked) > 1 and len(self.tied) == 1 else None

    @cached_property
    def speeds(self) -> Speeds | None:
        """How fast the methods learned; drawn once, for verdict, table and charts."""
        reference = _reference(self)
        return None if reference is None else speeds(self.results, reference)


def rank(results: ComparisonResults, draws: int = DRAWS) -> Ranking:
    """Rank the methods by their means on the seeds that all candidates have, and tell apart what can be told apart."""
    bootstrap, estimates = Bootstrap(results, draws), {}
    for method in results.methods:
        if method.status == "failed":  # with one seed at least; a mean over the others would flatter it
            continue
        # So would a mean without the runs whose loss was not finite.
        diverged = len(results.counted(method.method)) > len(bootstrap.figures.get(method.method, {}))
        if not diverged and (estimate := bootstrap.estimate(method.method)) is not None:
            estimates[method.method] = estimate
    candidates = [m.method for m in results.methods if m.is_candidate and m.method in estimates]
    shared = set.intersection(*(set(estimates[key].seeds) for key in candidates)) if candidates else set()

    def figure(key: str) -> float:
        figures = [value for seed, value in bootstrap.figures[key].items() if seed in shared or not shared]
        return bootstrap.sign * sum(figures) / len(figures)

    ranked = tuple(sorted(candidates, key=figure, reverse=True))
    leads = {key: bootstrap.difference(ranked[0], key) for key in estimates if ranked and key != ranked[0]}
    differences = {key: lead for key, lead in leads.items() if lead is not None}
    behind = {key for key, lead in differences.items() if lead.low is not None and lead.low > 0}
    tied = tuple(key for key in ranked if key not in behind)
    return Ranking(results, estimates, ranked, tied, differences)


def _reference(ranking: Ranking) -> str | None:
    """What speeds are compared with: LoRA, or without it the best method."""
    loras = [m.method for m in ranking.results.methods if m.peft_type == "LORA" and m.method in ranking.estimates]
    return next(iter(sorted(loras, key=lambda key: key != "lora") or ranking.ranked), None)
