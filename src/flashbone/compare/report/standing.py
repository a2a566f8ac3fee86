"""Who stands where: the methods matched in size from best to worst, the tied group, and every difference from the best.

Bounds and methods that could not be matched are measured against the best, but are no candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashbone.compare.report.results import Comparison, Method
from flashbone.compare.report.statistics import DRAWS, Bootstrap, Difference, Estimate


@dataclass(frozen=True)
class Standing:
    """`ranked` are the candidates with a test figure, best first; `tied` those of them that are not told apart from
    the first, itself included; `differences` are the best's leads over every other method (positive: best is better).
    """

    comparison: Comparison
    estimates: dict[str, Estimate]
    ranked: tuple[str, ...]
    tied: tuple[str, ...]
    differences: dict[str, Difference]

    @property
    def best(self) -> str | None:
        """The candidate with the best figure, alone or tied."""
        return self.ranked[0] if self.ranked else None

    @property
    def winner(self) -> str | None:
        """The best one if others were there to beat and none is tied with it."""
        return self.best if len(self.ranked) > 1 and len(self.tied) == 1 else None


def is_candidate(method: Method) -> bool:
    """Whether a method may be called best: matched in size, no bound, and not failed."""
    return method.matched and not method.bound and method.status != "failed"


def stand(comparison: Comparison, draws: int = DRAWS) -> Standing:
    """Rank the methods by their means on the seeds that all candidates have, and tell apart what can be told apart."""
    bootstrap = Bootstrap(comparison, draws)
    estimates = {}
    for method in comparison.methods:
        if method.status == "failed":  # with one seed at least: those with which it went well would flatter it
            continue
        diverged = len(comparison.counted(method.method)) > len(bootstrap.figures.get(method.method, {}))
        # A run whose loss was not finite counts against its method: no mean over the seeds that went well.
        if not diverged and (estimate := bootstrap.estimate(method.method)) is not None:
            estimates[method.method] = estimate
    candidates = [m.method for m in comparison.methods if is_candidate(m) and m.method in estimates]
    shared = set.intersection(*(set(estimates[key].seeds) for key in candidates)) if candidates else set()

    def figure(key: str) -> float:
        figures = [value for seed, value in bootstrap.figures[key].items() if seed in shared or not shared]
        return bootstrap.sign * sum(figures) / len(figures)

    ranked = tuple(sorted(candidates, key=figure, reverse=True))
    leads = {key: bootstrap.difference(ranked[0], key) for key in estimates if ranked and key != ranked[0]}
    differences = {key: lead for key, lead in leads.items() if lead is not None}
    behind = {key for key, lead in differences.items() if lead.low is not None and lead.low > 0}
    tied = tuple(key for key in ranked if key not in behind)
    return Standing(comparison, estimates, ranked, tied, differences)
