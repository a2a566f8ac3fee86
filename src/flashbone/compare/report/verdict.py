"""The verdict: the best method on the test set, the speed of learning and the cost, in three sentences, and notes.

It is blind to names.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashbone.compare.report import words
from flashbone.compare.report.costs import spread
from flashbone.compare.report.ranking import Ranking
from flashbone.compare.report.speed import NEVER
from flashbone.compare.results import ComparisonResults


@dataclass(frozen=True)
class Verdict:
    """Three sentences, about quality, the speed of learning (empty without curves) and cost, and notes."""

    best: str
    speed: str
    cost: str
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """All sentences."""
        return " ".join(filter(None, (self.best, self.speed, self.cost)))


def judge(ranking: Ranking) -> Verdict:
    """The verdict on a comparison, finished or not."""
    best, cost = (_best(ranking), _cost(ranking)) if ranking.ranked else _without_figures(ranking)
    return Verdict(best, _speed(ranking), cost, tuple(_notes(ranking)))


def _without_figures(ranking: Ranking) -> tuple[str, str]:
    results, methods = ranking.results, ranking.results.methods
    failed = [method for method in methods if method.status == "failed"]
    if methods and len(failed) == len(methods):
        best = f"All of {words.count(len(methods), 'method')} failed, so none can be called best."
        return best, f"The first error was that of {results.label(failed[0].method)}: {_sentence(failed[0].error)}"
    best = "No method matched in size has a figure on the test set, so none can be called best."
    others = [key for key in ranking.estimates if not results.method(key).is_candidate]
    if others:
        return best, f"Only bounds and unmatched methods have one ({words.names(results, others)}): see the table."
    unfinished = sum(method.status == "unfinished" for method in methods)
    has = words.count(len(methods), "method")
    return best, f"Of {has}, {unfinished} did not run to the end and {len(failed)} failed."


def _sentence(text: str | None) -> str:
    return f"{(text or 'no reason was recorded').rstrip('.')}."


def _best(ranking: Ranking) -> str:
    results, header, ranked = ranking.results, ranking.results.header, ranking.ranked
    metric, best = words.metric(header), ranked[0]
    figures = words.estimate(header, ranking.estimates[best])
    if len(ranked) == 1:
        interval = ", 95 % interval in brackets" if ranking.estimates[best].low is not None else ""
        return (
            f"{results.label(best)} is the only method matched in size that has a figure on the test set "
            f"({metric} {figures}{interval}), so there was nothing to compare it with."
        )
    if ranking.winner:
        after = ranking.differences[ranked[1]]
        certain = "" if after.share_better is None else f", better in {words.share(after.share_better)} of resamplings"
        lead = words.lead(header, after)
        return (
            f"{results.label(best)} ended best on the test set among the {len(ranked)} {_candidates(ranking)}: "
            f"{metric} {words.figure(header, ranking.estimates[best].mean)}, ahead of {results.label(ranked[1])}, "
            f"the next, by {lead} at 95 % confidence{certain}."
        )
    return _tie(ranking)


def _candidates(ranking: Ranking) -> str:
    return "methods matched in size" + ("" if ranking.results.header.finished else " that have a figure so far")


def _tie(ranking: Ranking) -> str:
    results, header, tied = ranking.results, ranking.results.header, list(ranking.tied)
    figures = [words.figure(header, ranking.estimates[key].mean) for key in tied]
    if len(tied) <= 4:
        listed = ", ".join(f"{results.label(key)} {at}" for key, at in zip(tied, figures, strict=True))
    else:
        listed = f"from {figures[0]} to {figures[-1]}: {words.names(results, tied)}"
    if len(tied) < len(ranking.ranked):
        who = f"Of the {len(ranking.ranked)} {_candidates(ranking)}, {len(tied)}"
    else:
        who = f"{'Both' if len(tied) == 2 else f'All {len(tied)}'} {_candidates(ranking)}"
    next_one = ranking.differences.get(tied[1])
    if next_one is None or next_one.share_better is None:
        why = "since there is nothing to judge their differences by"
    else:
        each = "their difference" if len(tied) == 2 else "each difference from the first"
        share = f"in {words.share(next_one.share_better)} of resamplings"
        why = f"since the 95 % interval of {each} includes 0 "
        why += f"({results.label(tied[0])} was better than {results.label(tied[1])} {share})"
    return f"{who} are tied for best on the test set ({words.metric(header)} {listed}), {why}."


def _speed(ranking: Ranking) -> str:
    """Who reached the reference's loss first, and whose curve was surely below or above its own on the way."""
    results, measured = ranking.results, ranking.speeds
    if measured is None:
        return ""
    others = {key: measured.methods[key] for key in ranking.ranked if key in measured.methods}
    others.pop(measured.reference, None)
    leads = {key: speed.lead for key, speed in others.items() if speed.lead is not None}
    if not leads:
        return ""
    name, first = results.label(measured.reference), min(others, key=lambda key: others[key].steps.mean)
    ends = f"the held-out loss with which {name} ends ({measured.loss:.4f})"
    if others[first].steps.mean == NEVER:
        reached = f"No other method reached {ends}"
    else:
        after = f"{words.until(others[first].steps)} of {measured.end:,} steps"
        reached = f"{results.label(first)} was the first at {ends}, after {after}"
    faster = [key for key, lead in leads.items() if not lead.tied and lead.mean > 0]
    slower = [key for key, lead in leads.items() if not lead.tied and lead.mean < 0]
    found = [
        f"{words.names(results, keys)} learned {word}"
        for keys, word in ((faster, "faster"), (slower, "slower"))
        if keys
    ]
    left = len(leads) - len(faster) - len(slower)
    found += [f"{words.count(left, 'method')} tied"] if left else []
    return f"{reached}; by the area between their curves and {name}'s, {', and '.join(found)}."


def _cost(ranking: Ranking) -> str:
    results = ranking.results
    group = ranking.tied if len(ranking.tied) > 1 else ranking.ranked
    memory, speed = _costs(results, group, "peak_mib"), _costs(results, group, "step_ms")
    if not memory or not speed:
        return "What it costs was not measured."
    if len(ranking.ranked) == 1:
        only = group[0]
        return f"It peaked at {memory[only]:,.0f} MiB, and a step took {words.milliseconds(speed[only])} ms."
    if ranking.winner:
        best, lean, fast = ranking.winner, min(memory, key=memory.__getitem__), min(speed, key=speed.__getitem__)
        used, took = memory.get(best), speed.get(best)
        if used is None or took is None:
            return "What it costs was not measured."
        return (
            f"It peaked at {used:,.0f} MiB, {_against(results, best, lean, memory, 'least', 'memory')}, and a step "
            f"took {words.milliseconds(took)} ms, {_against(results, best, fast, speed, 'fastest', 'step')}."
        )
    return _cheapest(results, memory, speed)


def _costs(results: ComparisonResults, group: tuple[str, ...], name: str) -> dict[str, float]:
    spreads = {key: spread(results, key, name) for key in group}
    return {key: value.mean for key, value in spreads.items() if value is not None and value.mean > 0}


def _against(results: ComparisonResults, best: str, least: str, costs: dict[str, float], most: str, what: str) -> str:
    if best == least:
        return f"the {most} {what} of all matched methods" if what == "memory" else f"the {most} of all"
    return f"{costs[best] / costs[least]:.2f} times that of {results.label(least)}, which has the {most} {what}"


def _cheapest(results: ComparisonResults, memory: dict[str, float], speed: dict[str, float]) -> str:
    lean, fast = min(memory, key=memory.__getitem__), min(speed, key=speed.__getitem__)
    needs = f"{results.label(lean)} needed the least memory ({memory[lean]:,.0f} MiB, {_others(memory)})"
    steps = f"the fastest steps ({words.milliseconds(speed[fast])} ms, {_others(speed)})"
    if lean == fast:
        return f"Among the tied, {needs} and took {steps}."
    return f"Among the tied, {needs}, and {results.label(fast)} took {steps}."


def _others(costs: dict[str, float]) -> str:
    least, *rest = sorted(costs.values())
    if not rest:
        return "the only one measured"
    low, high = f"{rest[0] / least:.2f}", f"{rest[-1] / least:.2f}"
    return f"the other{'s' if len(rest) > 1 else ''} {low if low == high else f'{low} to {high}'} times that"


def _notes(ranking: Ranking) -> list[str]:
    results, header = ranking.results, ranking.results.header
    notes = []
    if not header.finished:
        left = [m.method for m in results.methods if m.status == "unfinished"]
        which = f": {words.names(results, left)} still to run" if left else ""
        notes.append(f"The comparison is unfinished{which}. All figures are of what has run so far.")
    notes += [f"Fairness: {_sentence(problem)}" for problem in header.fairness.problems]
    notes += _notes_on_seeds(ranking)
    notes += _notes_on_methods(ranking)
    if header.jobs == "ray":
        notes.append("Runs were tasks of a Ray cluster: compare their seconds only if its machines are alike.")
    elif (header.jobs or 1) > 1:
        notes.append(f"{header.jobs} runs ran at the same time, so steps took longer than they would alone.")
    return notes


def _notes_on_seeds(ranking: Ranking) -> list[str]:
    results, resampled = ranking.results, {d.resampled for d in ranking.differences.values()}
    seeds = min((len(ranking.estimates[key].seeds) for key in ranking.ranked), default=0)
    notes = []
    if seeds == 1:
        notes.append(
            "One seed only: intervals come from resampling test rows and leave out the luck of the seed, which "
            "may be larger than the differences."
        )
    elif seeds == 2:
        notes.append("Two seeds only: intervals are wide, because two say little about the spread of more.")
    uneven = {ranking.estimates[key].seeds for key in ranking.ranked}
    if len(uneven) > 1:
        notes.append("Methods have different seeds so far: they are ranked on the seeds that all of them have.")
    if resampled & {"seeds", "nothing"}:
        notes.append("Some runs have no scores of single test rows: there only seeds were resampled, not rows.")
    finished = [m.method for m in results.methods if m.status != "failed" and results.counted(m.method)]
    diverged = [key for key in finished if key not in ranking.estimates]
    if diverged:
        notes.append(f"Not ranked, since a run's test figure was not finite: {words.names(results, diverged)}.")
    return notes


def _notes_on_methods(ranking: Ranking) -> list[str]:
    results, notes = ranking.results, []
    for edge in ("lowest", "highest"):
        keys = [m.method for m in results.methods if m.at_edge == edge and len(m.learning_rates) > 1]
        if keys:
            notes.append(
                f"The best learning rate was the {edge} of those tried for {words.names(results, keys)}: one beyond "
                "may be better still."
            )
    for method in results.methods:
        if method.status == "failed":
            notes.append(f"{results.label(method.method)} failed: {_sentence(method.error)}")
        broken = [r for r in results.runs if r.method == method.method and r.status == "failed"]
        if broken and method.status != "failed":
            where = ", ".join(f"seed {r.seed} at {words.rate(r.learning_rate)}" for r in broken if r.learning_rate)
            notes.append(f"A run of {results.label(method.method)} failed ({where}): {_sentence(broken[0].error)}")
    ahead = [k for k, d in ranking.differences.items() if k not in ranking.ranked and d.high is not None and d.high < 0]
    if ahead and ranking.ranked:
        who = words.names(results, ahead)
        notes.append(
            f"Better than the best matched method, but no candidate{'s' if len(ahead) > 1 else ''} (bound or "
            f"not matched in size): {who}."
        )
    return notes
