"""The plots of docs/benchmarks.md: time beside memory of all methods, and the growth of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import DTYPES
from benchmarks.rows import Row
from benchmarks.tables.markdown import TITLES, is_current, is_floor

COLOURS = {"flashbone": "#e45756", "PEFT": "#4c78a8", "PEFT 0.18.1": "#9d9da1"}
TEXTS = {
    "step": "Time of a training step beside its memory, every method as one point",
    "memory": "Memory above the frozen model's step, as tokens, r and the number of adapters grow",
}


def link(name: str) -> Callable[[list[Row]], str]:
    """The page's reference to a plot, where there are rows to draw it from."""
    drawable = {"step": lambda rows: bool(_points(rows)), "memory": lambda rows: bool(_grown(rows, "tokens"))}[name]
    return lambda rows: f"![{TEXTS[name]}](images/{name}.svg)" if drawable(rows) else ""


def draw(rows: list[Row], images: Path) -> None:
    """Draw what there are rows for, into the folder `images`."""
    if points := _points(rows):
        _save(lambda figure: _draw_points(figure, points), images / "step.svg", width=7)
    if _grown(rows, "tokens"):
        _save(lambda figure: _draw_growth(figure, rows), images / "memory.svg", width=10)


def _latest(rows: list[Row], benchmark: str, part: str, metric: str, dtype: str = "float32") -> list[Row]:
    found = [
        row
        for row in rows
        if (row.benchmark, row.part, row.metric, row.dtype) == (benchmark, part, metric, dtype)
        and (is_current(row) or not is_floor(row))
    ]
    latest = max((row.date for row in found), default="")
    return [row for row in found if row.date == latest]


def _points(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Method -> (ratio of a step's time to the floor, GiB above the floor), in bf16 if that was measured."""
    for dtype in (DTYPES["bf16-autocast"], DTYPES["fp32"]):
        time = {row.method: row.median for row in _latest(rows, "step", "main", "time_ratio", dtype)}
        memory = {row.method: row.median / 1024 for row in _latest(rows, "memory", "main", "above_floor_mib", dtype)}
        if found := {method: (time[method], memory[method]) for method in time if method in memory}:
            return found
    return {}


def _grown(rows: list[Row], part: str) -> dict[str, list[tuple[int, float]]]:
    """Method -> (what grew, MiB above the floor), in order."""
    size = {"tokens": lambda row: row.shape["batch"] * row.shape["seq"]}.get(part, lambda row: getattr(row, part))
    grown: dict[str, list[tuple[int, float]]] = {}
    for row in _latest(rows, "memory", part, "above_floor_mib"):
        if not is_floor(row):
            grown.setdefault(row.method, []).append((size(row), row.median))
    return {method: sorted(points) for method, points in grown.items()}


def _draw_points(figure: Any, points: dict[str, tuple[float, float]]) -> None:
    axes = figure.add_subplot()
    for method, point in points.items():
        axes.scatter(*point, color=COLOURS.get(_family(method), "black"), s=36, zorder=3)
    axes.set_xlabel("time of a training step (ratio to the frozen model's)")
    axes.set_ylabel("peak memory above the frozen model's (GiB)")
    axes.margins(0.12)
    _tidy(axes)
    taken = [axes.transData.transform(point) for point in points.values()]
    for method, point in points.items():
        _name_point(axes, method, point, taken)
    for family, colour in COLOURS.items():
        axes.scatter([], [], color=colour, s=36, label=family)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(COLOURS))


def _family(method: str) -> str:
    return "PEFT 0.18.1" if "0.18.1" in TITLES[method] else TITLES[method].split()[0]


def _name_point(axes: Any, name: str, point: tuple[float, float], taken: list[Any]) -> None:
    """Write a name beside its point, on the side that is farthest from what stands there already."""
    x, y = axes.transData.transform(point)
    width, height = 5 * len(name), 10

    def crowding(side: tuple[int, int]) -> int:
        centre_x, centre_y = x + side[0] * (8 + width / 2), y + side[1] * height
        return sum(abs(centre_x - u) < width / 2 + 12 and abs(centre_y - v) < height for u, v in taken)

    across, up = min([(1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)], key=crowding)
    taken.append((x + across * (8 + width / 2), y + up * height))
    align = {"ha": "left" if across > 0 else "right", "va": "center", "fontsize": 9}
    axes.annotate(name, point, xytext=(across * 7, up * 9), textcoords="offset points", **align)


def _draw_growth(figure: Any, rows: list[Row]) -> None:
    names = {"tokens": "tokens a step", "r": "r (LoRA: rank r/2)", "adapters": "active adapters"}
    colours: dict[str, str] = {}
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, (part, name) in zip(panels, names.items(), strict=True):
        for method, points in _grown(rows, part).items():
            label = None if method in colours else method
            colour = colours.setdefault(method, f"C{len(colours)}")
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, color=colour)
        axes.set_xlabel(name)
    for axes in panels:
        _tidy(axes)
    panels[0].set_ylabel("peak memory above the frozen model's (MiB)")
    figure.legend(frameon=False, loc="outside upper center", ncols=len(colours))


def _tidy(axes: Any) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(paint: Callable[[Any], None], target: Path, width: float) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    target.parent.mkdir(parents=True, exist_ok=True)
    # A fixed salt and no date: the same rows give the same file.
    with rc_context({"svg.hashsalt": "flashbone"}):
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(target, format="svg", metadata={"Date": None})
