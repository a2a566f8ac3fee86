"""The charts as PNGs: learning curves, memory against quality, the sweep of learning rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashbone.compare.report import style, words
from flashbone.compare.report.costs import band, spread
from flashbone.compare.report.payload import sweep
from flashbone.compare.report.statistics import Ranking
from flashbone.train import drawing

MANY = 4  # methods; with more the bands would hide each other


def draw(ranking: Ranking, folder: Path) -> list[Path]:
    """Draw what there are figures for into `folder`; returns the PNGs' paths."""
    comparison = ranking.comparison
    keys = [m.method for m in comparison.methods]
    curved = [key for key in keys if any(band(comparison.counted(key), name) for name in ("train", "held_out"))]
    placed = [key for key in keys if key in ranking.estimates and spread(comparison, key, "peak_mib")]
    swept = [key for key in keys if sweep(comparison, key)]
    paths = []
    if curved:
        paths.append(_save(ranking, curved, _draw_curves, folder / "learning_curves.png", (12, 8), (2, 2)))
    if placed:
        paths.append(_save(ranking, placed, _draw_memory, folder / "memory_quality.png", (8, 5.5), (1, 1)))
    if swept:
        paths.append(_save(ranking, swept, _draw_rates, folder / "learning_rates.png", (8, 5.5), (1, 1)))
    return paths


def _save(
    ranking: Ranking,
    keys: list[str],
    paint: Callable[[Ranking, list[str], Any], None],
    target: Path,
    size: tuple[float, float],
    panels: tuple[int, int],
) -> Path:
    figure, axes = drawing.blank(size, *panels)
    paint(ranking, keys, axes)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right upper")
    return drawing.save(figure, target)


def _look(ranking: Ranking, key: str) -> dict[str, Any]:
    number = [m.method for m in ranking.comparison.methods].index(key)
    dashes = style.DASHES[style.dash(number)]
    return {
        "color": style.LIGHT[style.colour(number)],
        "marker": style.MARKERS[style.dash(number)],
        "linestyle": (0, dashes) if dashes else "-",
        "linewidth": 1.6,
        "markersize": 5,
    }


def _label(ranking: Ranking, key: str) -> str:
    """A title as matplotlib may show it: short, no mathematics, and no underscore first, which hides a label."""
    text = ranking.comparison.label(key).replace("$", r"\$")
    text = text if len(text) <= 28 else f"{text[:27]}…"
    return f" {text}" if text.startswith("_") else text


def _draw_curves(ranking: Ranking, keys: list[str], axes: Any) -> None:
    comparison = ranking.comparison
    for line, (name, title) in enumerate((("held_out", "held-out loss"), ("train", "training loss"))):
        for column, across in enumerate(("step", "seconds")):
            panel = axes[line, column]
            for key in keys:
                _draw_curve(panel, band(comparison.counted(key), name), across, _look(ranking, key), len(keys) <= MANY)
            panel.set_ylabel(title)
            panel.set_xlabel("optimiser step" if across == "step" else "seconds of training, with start-up")
    for key in keys:
        axes[0, 0].plot([], [], label=_label(ranking, key), **_look(ranking, key))


def _draw_curve(panel: Any, curve: Any, across: str, look: dict[str, Any], with_band: bool) -> None:
    if curve is None:
        return
    nan = float("nan")
    x, *lines = (
        [nan if at is None else at for at in values]
        for values in (getattr(curve, across), curve.mean, curve.low, curve.high)
    )
    if len(x) > 20:
        look = {**look, "marker": None}
    panel.plot(x, lines[0], **look)
    if with_band:
        panel.fill_between(x, lines[1], lines[2], color=look["color"], alpha=0.15, linewidth=0)


def _draw_memory(ranking: Ranking, keys: list[str], axes: Any) -> None:
    panel, header = axes[0, 0], ranking.comparison.header
    factor = 1 if header.metric == "loss" else 100
    for key in keys:
        estimate, peak = ranking.estimates[key], spread(ranking.comparison, key, "peak_mib")
        assert peak is not None
        low, high = (estimate.mean if end is None else end for end in (estimate.low, estimate.high))
        mean = factor * estimate.mean
        # A skewed interval may leave out its mean.
        error = [[max(0.0, mean - factor * low)], [max(0.0, factor * high - mean)]]
        look = {**_look(ranking, key), "linestyle": "none", "markersize": 7}
        panel.errorbar([peak.mean], [mean], yerr=error, elinewidth=1, label=_label(ranking, key), **look)
    panel.set_xlabel("peak MiB")
    panel.set_ylabel(f"test {words.metric(header)}{'' if factor == 1 else ' (%)'}, 95 % interval")


def _draw_rates(ranking: Ranking, keys: list[str], axes: Any) -> None:
    panel = axes[0, 0]
    for key in keys:
        points = sweep(ranking.comparison, key)
        look, chosen = _look(ranking, key), ranking.comparison.method(key).chosen
        panel.plot(*zip(*points, strict=True), label=_label(ranking, key), **look)
        for rate, loss in points:
            if rate == chosen:
                panel.scatter([rate], [loss], s=110, facecolors="none", edgecolors=look["color"])
    panel.set_xscale("log")
    panel.set_xlabel("learning rate; a ring marks the chosen one")
    panel.set_ylabel("held-out loss, first seed")
