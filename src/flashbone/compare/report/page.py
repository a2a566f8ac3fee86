"""report.html: one file that loads nothing, from the assets beside this module and the results; all text is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template

from flashbone.compare.report import figures, words
from flashbone.compare.report.ranking import Ranking
from flashbone.compare.report.tables import ResultsTable, TableCell, TableColumn, TableRow, results_table
from flashbone.compare.report.verdict import judge
from flashbone.compare.results import ComparisonResults, HeaderRow, MethodRow


def page(ranking: Ranking) -> str:
    """The whole page. Its policy allows this style and this script by their hashes, and no request at all."""
    results, header = ranking.results, ranking.results.header
    verdict, table = judge(ranking), results_table(ranking)
    sheet, script = figures.css(len(results.methods)) + _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; style-src {_hash(sheet)}; script-src {_hash(script)}; "
    return Template(_asset("page.html")).substitute(
        policy=policy + "base-uri 'none'; form-action 'none'",
        sheet=sheet,
        script=script,
        name=escape(header.name),
        subtitle=escape(f"{words.count(len(results.methods), 'method')} on {header.model}"),
        best=escape(verdict.best),
        cost=escape(verdict.cost),
        speed=escape(verdict.speed),
        notes=_list(verdict.notes, "notes"),
        table=_table(table),
        meanings=_facts((column.head, column.meaning) for column in table.columns),
        charts=_charts(ranking),
        commands=_commands(ranking),
        measured=_measured(header),
    )


def _asset(name: str) -> str:
    return files("flashbone.compare.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _list(texts: Iterable[str], name: str) -> str:
    """A list of this class; nothing where there are no texts."""
    items = "\n".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="{name}">\n{items}\n</ul>' if items else ""


def _facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values; those without a value are left out."""
    listed = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs if value)
    return "<dl>\n" + "\n".join(listed) + "\n</dl>"


def _table(table: ResultsTable) -> str:
    """The table; the script makes its heads buttons that sort by `data-value`."""
    heads = "".join(
        f'<th scope="col"{_class(column)} title="{escape(column.meaning)}">{escape(column.head)}</th>'
        for column in table.columns
    )
    body = "\n".join(_row(row, table.columns) for row in table.rows)
    return f'<table id="methods">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _class(column: TableColumn) -> str:
    return "" if column.is_text else ' class="number"'


def _row(row: TableRow, columns: tuple[TableColumn, ...]) -> str:
    name = escape(row.cells["method"].text)
    tag = f' <span class="tag {row.group}">{escape(row.note)}</span>' if row.note else ""
    if row.error is not None:
        cells = f'<td colspan="{len(columns) - 1}">{escape(row.error)}</td>'
    else:
        cells = "".join(_cell(column, row.cells[column.key]) for column in columns[1:])
    return f'<tr class="{row.group}"><th scope="row" data-value="{name}">{name}{tag}</th>{cells}</tr>'


def _cell(column: TableColumn, cell: TableCell) -> str:
    value = cell.text if column.is_text else "" if cell.value is None else repr(cell.value)
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    return f'<td{_class(column)} data-value="{escape(value)}">{text}</td>'


def _charts(ranking: Ranking) -> str:
    """All panels under their headings, and a legend whose boxes switch methods off."""
    results, charts = ranking.results, figures.charts(ranking)
    if not charts:
        return ""
    shown = {key for chart in charts for panel in chart.panels for key in panel.methods}
    legend = []
    for number, method in enumerate(results.methods):
        if method.method in shown:
            colour, dash = figures.look_of(number)
            mark = f'<span class="c{colour}" aria-hidden="true">{[*figures.MARKERS.values()][dash]}</span>'
            box = f'<input type="checkbox" id="shown-{number}" checked>'
            legend.append(f"<label>{box}{mark} {escape(results.label(method.method))}</label>")
    sections = []
    for chart in charts:
        panels = (f"<figure>{figures.svg(panel, results)}</figure>" for panel in chart.panels if panel.methods)
        sections.append(f'<div class="{chart.name}">\n<h2>{chart.title}</h2>\n' + "\n".join(panels) + "\n</div>")
    return Template(_asset("charts.html")).substitute(legend="\n".join(legend), charts="\n".join(sections))


def _commands(ranking: Ranking) -> str:
    """Commands to copy; those to train the best methods come first."""
    results = ranking.results
    best = [method for key in ranking.tied if (method := results.method(key)).train]
    again = [method for method in results.methods if method.rerun]
    others = [method for method in results.methods if method.train and method not in best]
    parts = []
    if best:
        title = "Train the winner for real" if ranking.winner else "Train one of the best for real"
        parts.append(f"<h3>{title}</h3>\n{_lines(results, best, 'train')}")
    if again:
        opened = " open" if len(again) <= 4 else ""
        lines = _lines(results, again, "rerun")
        parts.append(f"<details{opened}><summary>Run one row again</summary>\n{lines}\n</details>")
    if others:
        lines = _lines(results, others, "train")
        parts.append(f"<details><summary>Train one of the others</summary>\n{lines}\n</details>")
    return "\n".join(parts) or "<p>The file names no commands.</p>"


def _lines(results: ComparisonResults, methods: list[MethodRow], name: str) -> str:
    return "\n".join(
        f'<div class="command"><span>{label}</span><code tabindex="0">{escape(getattr(method, name))}</code>'
        f'<button type="button" class="copy" aria-label="Copy the command for {label}" hidden>Copy</button></div>'
        for method in methods
        for label in [escape(results.label(method.method))]
    )


def _measured(header: HeaderRow) -> str:
    """How it was measured: what, with how much, on what; and what was checked for fairness."""
    data = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in header.data.items() if key != "path")
    steps = words.count(header.steps, "step") if header.steps else ""
    epochs = f"{header.epochs:g} epoch{'' if header.epochs == 1 else 's'}" if header.epochs else ""
    facts = {
        "model": header.model,
        "data": f"{header.data.get('path', '')}: {data}",
        "measured by": f"{words.metric(header)} on the test set, which no choice looks at",
        "budget": _budget(header),
        "training": ", ".join(filter(None, (steps, epochs))),
        "seeds": ", ".join(map(str, header.seeds)),
        "hardware": ": ".join(filter(None, (header.device, header.hardware))),
        "runs at once": "tasks of a Ray cluster" if header.jobs == "ray" else header.jobs,
        "versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
        "commit": header.commit,
        "date": header.date,
        "command": header.command,
    }
    checked = _list(header.fairness.checked, "checked")
    return _facts(facts.items()) + (f"\n<h3>Checked for fairness</h3>\n{checked}" if checked else "")


def _budget(header: HeaderRow) -> str:
    budget = header.budget or {}
    if not isinstance(budget.get("parameters"), int):
        return ""
    within = "" if header.tolerance is None else f", within {100 * header.tolerance:g} %"
    origin = f" (those of {budget['from']})" if budget.get("from") else ""
    return f"{budget['parameters']:,} trainable adapter parameters{origin}{within}"
