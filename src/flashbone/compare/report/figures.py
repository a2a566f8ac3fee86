"""The charts: each is drawn by matplotlib, as a PNG beside the page and as SVG inside it.

Seven colours after Okabe and Ito (2008), made darker or lighter until they stand out from a white or a dark ground
(contrast of 3 or more) and are told apart in dichromacy; a test holds both.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from flashbone.compare.report import words
from flashbone.compare.report.costs import Band, Spread, band, spread, sweep
from flashbone.compare.report.ranking import Ranking
from flashbone.compare.report.speed import NEVER, Until
from flashbone.compare.report.statistics import Estimate
from flashbone.compare.results import ComparisonResults
from flashbone.train import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT = ("#0468b3", "#a23600", "#009e73", "#a84b85", "#b5830b", "#4498cb", "#222222")
DARK = ("#3792db", "#e56e28", "#2aba81", "#c581ac", "#ffca46", "#93d1f7", "#f0f1f1")
LIGHT_GROUND, DARK_GROUND = "#fcfcfa", "#16181c"
# From the eighth method on the colours come again, with the next dash and marker.
DASHES = ("-", (0, (6, 3)), (0, (1.5, 2.5)))
MARKERS = {"o": "●", "s": "■", "^": "▲"}  # of matplotlib, and for the page's legend
CURVES = {"held_out": "held-out loss", "train": "training loss"}
ACROSS = {"step": "optimiser step", "seconds": "seconds of training, with start-up"}
MANY = 4  # methods; with more the bands would hide each other

Painter = Callable[["Axes", dict[str, Any]], None]


@dataclass(frozen=True)
class Panel:
    """Axes with their labels; for each method a sentence on its figures, and what draws them in a look."""

    x: str
    y: str
    methods: dict[str, tuple[str, Painter]]
    log_ticks: tuple[float, ...] = ()  # of a logarithmic x axis
    names: tuple[str, ...] = ()  # of the places on the y axis, from above


@dataclass(frozen=True)
class Chart:
    """Panels that share a heading and a PNG."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def charts(ranking: Ranking) -> list[Chart]:
    """The charts that have any data."""
    curves = [_curves(ranking.results, name, across) for name in CURVES for across in ACROSS]
    made = (
        Chart("learning_curves", "Learning curves", tuple(curves)),
        Chart("learning_speed", "Speed of learning", (_speed(ranking),)),
        Chart("memory_quality", "Memory against quality", (_memory(ranking),)),
        Chart("learning_rates", "Learning rates tried", (_rates(ranking.results),)),
    )
    return [chart for chart in made if any(panel.methods for panel in chart.panels)]


def _curves(results: ComparisonResults, name: str, across: str) -> Panel:
    bands = {method.method: band(results.counted(method.method), name) for method in results.methods}
    curves = {key: curve for key, curve in bands.items() if curve is not None}
    methods: dict[str, tuple[str, Painter]] = {}
    for key, curve in curves.items():
        points = [(x, y) for x, y in zip(getattr(curve, across), curve.mean, strict=True) if None not in (x, y)]
        some = points[:: max(1, len(points) // 6)] + points[-1:]
        texts = (f"{y:.4f} at {f'step {x}' if across == 'step' else f'{x:,.1f} s'}" for x, y in dict.fromkeys(some))
        text = f"{results.label(key)}: {CURVES[name]} {', '.join(texts)}"
        methods[key] = text, partial(_paint_curve, curve, across, len(curves) <= MANY)
    unit = "nats per token" if results.header.task == "sft" else "cross-entropy"
    return Panel(ACROSS[across], f"{CURVES[name]} ({unit})", methods)


def _paint_curve(curve: Band, across: str, with_band: bool, axes: Axes, look: dict[str, Any]) -> None:
    x, mean, low, high = (
        [float("nan") if value is None else value for value in values]
        for values in (getattr(curve, across), curve.mean, curve.low, curve.high)
    )
    if with_band:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(x, mean, **(look if len(x) <= 20 else {**look, "marker": ""}))


def _speed(ranking: Ranking) -> Panel:
    """Steps to the reference's loss, the fewest above; right of the last step is never."""
    measured, results = ranking.speeds, ranking.results
    if measured is None or len(measured.methods) < 2:
        return Panel("steps", "method", {})
    order = sorted(measured.methods, key=lambda key: measured.methods[key].steps.mean)
    methods: dict[str, tuple[str, Painter]] = {}
    for place, key in enumerate(order):
        speed = measured.methods[key]
        text = f"{results.label(key)}: {words.until(speed.steps)} steps, {words.until(speed.seconds)} s"
        text += "" if speed.lead is None else f", lead on the way {words.loss_lead(speed.lead)}"
        methods[key] = text, partial(_paint_speed, place, speed.steps, measured.end)
    name = results.label(measured.reference)
    label = f"steps to {name}'s last held-out loss ({measured.loss:.4f})"
    return Panel(label, "method", methods, names=tuple(map(results.label, order)))


def _paint_speed(place: int, steps: Until, end: int, axes: Axes, look: dict[str, Any]) -> None:
    never = 1.06 * end
    mean, low, high = (
        never if value == NEVER else steps.mean if value is None else value
        for value in (steps.mean, steps.low, steps.high)
    )
    error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
    look = {**look, "linestyle": "none", "markersize": 6, "fillstyle": "none" if steps.mean == NEVER else "full"}
    axes.errorbar([mean], [place], xerr=error, elinewidth=1.4, **look)
    if high == never > mean:  # past all steps
        axes.plot([never], [place], marker=">", markersize=6, color=look["color"], linewidth=0)
    axes.set_xlim(0, 1.1 * end)


def _memory(ranking: Ranking) -> Panel:
    results, header, methods = ranking.results, ranking.results.header, {}
    metric, factor = words.metric(header), 1 if header.metric == "loss" else 100
    for method in results.methods:
        key = method.method
        estimate, peak = ranking.estimates.get(key), spread(results, key, "peak_mib")
        if estimate and peak:
            text = f"{results.label(key)}: {peak.mean:,.0f} MiB, {metric} {words.estimate(header, estimate)}"
            methods[key] = text, partial(_paint_memory, estimate, peak, factor)
    return Panel("peak MiB", f"test {metric}{'' if factor == 1 else ' (%)'}, 95 % interval", methods)


def _paint_memory(estimate: Estimate, peak: Spread, factor: int, axes: Axes, look: dict[str, Any]) -> None:
    low, high = (estimate.mean if end is None else end for end in (estimate.low, estimate.high))
    # A skewed interval may leave out its mean.
    error = [[factor * max(0.0, estimate.mean - low)], [factor * max(0.0, high - estimate.mean)]]
    look = {**look, "linestyle": "none", "markersize": 7}
    axes.errorbar([peak.mean], [factor * estimate.mean], yerr=error, elinewidth=1, **look)


def _rates(results: ComparisonResults) -> Panel:
    methods, tried = {}, set()
    for method in results.methods:
        if points := sweep(results, method.method):
            tried |= {rate for rate, _ in points}
            ends = (f"{y:.4f} at {words.rate(x)}{' (chosen)' if x == method.chosen else ''}" for x, y in points)
            text = f"{results.label(method.method)}: held-out loss {', '.join(ends)}"
            methods[method.method] = text, partial(_paint_rates, points, method.chosen)
    label = "learning rate; a ring marks the chosen one"
    return Panel(label, "held-out loss, first seed", methods, tuple(sorted(tried)))


def _paint_rates(points: list[tuple[float, float]], chosen: float | None, axes: Axes, look: dict[str, Any]) -> None:
    axes.plot(*zip(*points, strict=True), **look)
    ring = [point for point in points if point[0] == chosen]
    axes.plot(*zip(*ring, strict=True), marker="o", markersize=11, color=look["color"], fillstyle="none", linewidth=0)


def look_of(number: int) -> tuple[int, int]:
    """The number of a method's colour, and that of its dash and marker."""
    return number % len(LIGHT), number // len(LIGHT) % len(MARKERS)


def _look(number: int) -> dict[str, Any]:
    colour, dash = look_of(number)
    line = {"color": LIGHT[colour], "linestyle": DASHES[dash], "linewidth": 1.6}
    return {**line, "marker": list(MARKERS)[dash], "markersize": 5}


def _paint(panel: Panel, results: ComparisonResults, axes: Axes) -> None:
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    if panel.log_ticks:
        axes.set_xscale("log")
    if 0 < len(panel.log_ticks) <= 6:
        axes.set_xticks(panel.log_ticks, [words.rate(rate) for rate in panel.log_ticks])
        axes.set_xticks([], minor=True)
    if panel.names:
        axes.set_yticks(range(len(panel.names)), [_plain(name) for name in panel.names])
        axes.set_ylim(len(panel.names) - 0.5, -0.5)
    for number, method in enumerate(results.methods):
        if method.method in panel.methods:
            before = set(axes.get_children())
            panel.methods[method.method][1](axes, _look(number))
            for artist in set(axes.get_children()) - before:
                artist.set_gid(f"method-{number}")


def _plain(label: str) -> str:
    """A label that matplotlib shows as it is, and that leaves room."""
    label = label if len(label) <= 28 else f"{label[:27]}…"
    return label.replace("$", r"\$")  # which would begin mathematics


def draw_png(chart: Chart, results: ComparisonResults, folder: Path) -> Path:
    """Draw a chart with all of its panels and a legend into `folder`; returns the PNG's path."""
    from matplotlib.lines import Line2D

    wide = len(chart.panels) > 1
    figure, axes = drawing.blank((12, 8) if wide else (8, 5.5), *((2, 2) if wide else (1, 1)))
    for panel, panel_axes in zip(chart.panels, axes.ravel(), strict=True):
        _paint(panel, results, panel_axes)
    handles = []
    for number, method in enumerate(results.methods):
        if any(method.method in panel.methods and not panel.names for panel in chart.panels):
            label = _plain(results.label(method.method))
            label = f" {label}" if label.startswith("_") else label  # which would hide it
            handles.append(Line2D([], [], label=label, **_look(number)))
    if handles:
        figure.legend(handles=handles, frameon=False, loc="outside right upper")
    return drawing.save(figure, folder / f"{chart.name}.png")


def svg(panel: Panel, results: ComparisonResults) -> str:
    """A panel as SVG for a page that has variables for the colours, and a class for each method. What is drawn for a
    method is one group that can have the focus and is labelled with the method's figures."""
    import matplotlib

    figure, axes = drawing.blank((5, 3.5))
    figure.patch.set_visible(False)
    axes[0, 0].patch.set_visible(False)
    _paint(panel, results, axes[0, 0])
    drawn = io.BytesIO()
    salt: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": panel.x + panel.y}
    with matplotlib.rc_context(salt), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has others
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(drawn.getvalue())
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "group", "aria-label": f"{panel.y} by {panel.x}"})
    for element in list(root.iter()):
        _make_inline(element)
        for number, method in enumerate(results.methods):
            parts = [child for child in element if child.get("id") == f"method-{number}"]
            if parts:
                element.append(_group(parts, number, panel.methods[method.method][0]))
                for part in parts:
                    element.remove(part)
    return ElementTree.tostring(root, encoding="unicode")


def _group(parts: list[ElementTree.Element], number: int, text: str) -> ElementTree.Element:
    labels = {"class": f"method method-{number}", "tabindex": "0", "role": "img", "aria-label": text}
    group = ElementTree.Element("g", labels)
    ElementTree.SubElement(group, "title").text = text
    group.extend(parts)
    return group


def _make_inline(element: ElementTree.Element) -> None:
    """Remove what drawings in a page do not need or must not have: ids, metadata, styles, fixed colours."""
    element.tag = element.tag.rpartition("}")[2]
    if element.tag == "g":
        element.attrib.pop("id", None)  # the same in all; those that are referred to have other tags
    for child in list(element):
        if child.tag.endswith(("}metadata", "}style")):
            element.remove(child)
    styles = re.findall(r"([\w-]+): ([^;]+)", element.attrib.pop("style", ""))
    for name, value in [*element.attrib.items(), *styles]:
        element.attrib.pop(name, None)
        if name == "font":
            name, value = "font-size", re.sub(r".*?([\d.]+)px.*", r"\1", value)
        value = f"var(--c{LIGHT.index(value)})" if value in LIGHT else value
        element.set(name.rpartition("}")[2], "currentColor" if value == "#000000" else value)


def css(methods: int) -> str:
    """The colours as variables of CSS for both themes, and the rules by which the legend hides or stresses a method."""
    colours = [
        f"  --c{n}: light-dark({light}, {dark});" for n, (light, dark) in enumerate(zip(LIGHT, DARK, strict=True))
    ]
    ground = f"  --ground: light-dark({LIGHT_GROUND}, {DARK_GROUND});"
    marks = [f".c{n} {{ color: var(--c{n}); }}" for n in range(len(LIGHT))]
    shown = [
        f"main:has(#shown-{n}:not(:checked)) .method-{n} {{ display: none; }}\n"
        f"main:has(label:hover > #shown-{n}, #shown-{n}:focus-visible) .method:not(.method-{n}) {{ opacity: 0.2; }}"
        for n in range(methods)
    ]
    return "\n".join([":root {", ground, *colours, "}", *marks, *shown, ""])
