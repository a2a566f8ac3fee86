"""report.html: one file without anything from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row
from benchmarks.tables.markdown import TITLES, cell

if TYPE_CHECKING:
    from benchmarks.report import Part

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4c78a8; --good: #2a7d3f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bar: #7aa6d6; --good: #6bc283; --bad: #f2867e; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; height: .7rem; background: var(--bar); border-radius: 2px; }
.good { color: var(--good); } .bad { color: var(--bad); } td.words { white-space: normal; }
.note { color: #888; }
"""
Cell = tuple[str, str]  # its class and its content, in HTML


def written(parts: list[Part], environment: dict[str, dict[str, str]]) -> str:
    """The page."""
    measured = [row.device for part in parts for row in part.rows]
    sections = [_verdicts(parts)]
    for part in parts:
        if part.rows or part.failures:
            sections.append(f"<h2>{html.escape(part.name)}</h2>{''.join(_failures(part))}{_tables(part.rows)}")
    sections.append("<h2>environment</h2>" + "".join(_environment(environment)))
    title = f"flashbone on {measured[0] if measured else 'a device on which nothing ran'}"
    tiny = environment["report"].get("sizes", "")
    note = f"<p class=bad>{html.escape(tiny)}</p>" if tiny else ""
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    body = f"<h1>{html.escape(title)}</h1>{note}{''.join(sections)}"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def _verdicts(parts: list[Part]) -> str:
    lines = []
    for part in parts:
        kind = "good" if part.verdict == "done" else "bad" if part.verdict.startswith("failed") else "note"
        words = (f"words {kind}", html.escape(part.verdict))
        lines.append([_text(part.name), _number(f"{part.seconds:.0f}"), words])
    return _table(["part", "seconds", "what became of it"], lines)


def _failures(part: Part) -> Iterable[str]:
    return (f"<p class=bad>{html.escape(failure)}</p>" for failure in part.failures)


def _tables(rows: list[Row]) -> str:
    """The tables of a part: errors beside limits, predictions beside measurements, the figures of methods."""
    errors = [row for row in rows if row.metric == "relative_error"]
    predictions = [row for row in rows if row.benchmark == "roofline"]
    others = [row for row in rows if row not in errors and row not in predictions]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in others:
        sizes = (f"{name} {size}" for name, size in row.shape.items())
        groups.setdefault((row.dtype.replace("-", ", "), *sizes), []).append(row)
    figures = (_figures(", ".join(key), group) for key, group in groups.items())
    return _errors(errors) + _predictions(predictions) + "".join(figures)


def _errors(rows: list[Row]) -> str:
    """The largest error of each kind; those of one layer beside each other."""
    kinds = list(dict.fromkeys(row.shape["what"] for row in rows))
    largest: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        of_layer = largest.setdefault((row.method, row.shape.get("how") or row.shape["kernel"], row.dtype), {})
        before = of_layer.get(row.shape["what"])
        if before is None or not row.median <= before.median:
            of_layer[row.shape["what"]] = row
    lines = []
    for key, of_layer in largest.items():
        limit = max(row.shape["limit"] for row in of_layer.values())
        cells = [_error(of_layer[kind]) if kind in of_layer else _text("") for kind in kinds]
        lines.append([*map(_text, key), *cells, _number(f"{limit:.1e}")])
    return _table(["", "how", "dtype", *kinds, "limit"], lines) if lines else ""


def _error(row: Row) -> Cell:
    return f"number {'good' if row.median <= row.shape['limit'] else 'bad'}", f"{row.median:.1e}"


def _predictions(rows: list[Row]) -> str:
    from benchmarks.roofline.command import pairs

    lines = []
    for row, predicted, measured in pairs(rows):
        figures = [f"{predicted:.3f}", f"{measured:.3f}", f"{predicted / measured - 1:+.0%}"]
        lines.append([_text(" x ".join(_sizes(row))), _text(TITLES[row.method]), *map(_number, figures)])
    head = ["tokens x in x out", "method", "PREDICTED ms", "measured ms", "off by"]
    return _table(head, lines) if lines else ""


def _figures(title: str, rows: list[Row]) -> str:
    """A line for each method: what it took, and how it is to the frozen base, as a bar."""
    of_methods: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        of_methods.setdefault((row.method, row.adapters), []).append(row)
    metrics = list(dict.fromkeys(row.metric for row in rows))
    drawn = next((name for name in metrics if name.endswith("_ratio") or name == "above_floor_mib"), metrics[0])
    metrics = [drawn, *(metric for metric in metrics if metric != drawn)]
    most = max((row.median for row in rows if row.metric == drawn), default=1) or 1
    lines = []
    for (name, adapters), of_method in of_methods.items():
        by_metric = {row.metric: row for row in of_method}
        cells = [_number(cell(by_metric[metric])) if metric in by_metric else _text("") for metric in metrics]
        width = max(by_metric[drawn].median / most, 0) * 9 if drawn in by_metric else 0
        bar = ("", f"<span class=bar style='width:{width:.2f}rem'></span>")
        several = f", {adapters} adapters" if adapters > 1 else ""
        lines.append([_text(TITLES.get(name, name) + several), *cells, bar])
    words = [metric.removesuffix("_ms").removesuffix("_mib").replace("_", " ") for metric in metrics]
    return f"<h3>{html.escape(title)}</h3>" + _table(["method", *words, ""], lines)


def _sizes(row: Row) -> list[str]:
    return [str(size) for size in row.shape.values()]


def _environment(environment: dict[str, dict[str, Any]]) -> Iterable[str]:
    for title, part in environment.items():
        yield f"<h3>{html.escape(title)}</h3>"
        yield _table(["", ""], [[_text(name), ("words", html.escape(str(value)))] for name, value in part.items()])


def _text(words: str) -> Cell:
    return "", html.escape(words)


def _number(words: str) -> Cell:
    return "number", html.escape(words)


def _table(head: list[str], lines: list[list[Cell]]) -> str:
    kinds = ["number" if kind.startswith("number") else "" for kind, _ in lines[0]]
    names = zip(kinds, head, strict=True)
    top = "".join(f"<th class='{kind}'>{html.escape(name)}</th>" for kind, name in names) if any(head) else ""
    body = "".join(f"<tr>{''.join(f'<td class={kind!r}>{text}</td>' for kind, text in line)}</tr>" for line in lines)
    return f"<div class=wide><table><tr>{top}</tr>{body}</table></div>"
