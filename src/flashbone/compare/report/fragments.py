"""The parts of the page that need no script: verdict, notes, table, commands, how it was measured; all text escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from flashbone.compare.report import words
from flashbone.compare.report.results import HeaderRow
from flashbone.compare.report.statistics import Ranking
from flashbone.compare.report.tables import Cell, Column, Row, columns, describe, rows


def notes(texts: Iterable[str]) -> str:
    """A list of notes, nothing where there are none."""
    items = "\n".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="notes">\n{items}\n</ul>' if items else ""


def table(ranking: Ranking) -> str:
    """The table; scripts make its heads buttons that sort by `data-value`."""
    shown = columns(ranking)
    heads = "".join(
        f'<th scope="col"{_numeric(column)} title="{escape(column.meaning)}">{escape(column.head)}</th>'
        for column in shown
    )
    body = "\n".join(_row(row, shown, ranking) for row in rows(ranking))
    return f'<table id="methods">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def legend(ranking: Ranking) -> str:
    """What the columns mean."""
    items = (f"<dt>{escape(c.head)}</dt><dd>{escape(c.meaning)}</dd>" for c in columns(ranking))
    return "<dl>" + "\n".join(items) + "</dl>"


def _numeric(column: Column) -> str:
    return "" if column.key in ("method", "size") else ' class="number"'


def _row(row: Row, shown: list[Column], ranking: Ranking) -> str:
    note = describe(row, ranking)
    tag = f' <span class="tag {row.group}">{escape(note)}</span>' if note else ""
    name = (
        f'<th scope="row" data-value="{escape(row.cells["method"].text)}">{escape(row.cells["method"].text)}{tag}</th>'
    )
    if row.error is not None:
        return f'<tr class="failed">{name}<td colspan="{len(shown) - 1}">{escape(row.error)}</td></tr>'
    cells = "".join(_cell(column, row.cells.get(column.key, Cell())) for column in shown[1:])
    return f'<tr class="{row.group}">{name}{cells}</tr>'


def _cell(column: Column, cell: Cell) -> str:
    value = cell.text if column.key == "size" else "" if cell.value is None else repr(cell.value)
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    return f'<td{_numeric(column)} data-value="{escape(value)}">{text}</td>'


def commands(ranking: Ranking) -> str:
    """For each method its commands to copy; those to train the best for real come first."""
    comparison, parts = ranking.comparison, []
    best = [m for key in ranking.tied if (m := comparison.method(key)).train]
    if best:
        title = "Train the winner for real" if ranking.winner else "Train one of the best for real"
        lines = "\n".join(_command(comparison.label(m.method), m.train or "") for m in best)
        parts.append(f"<h3>{title}</h3>\n{lines}")
    again = [m for m in comparison.methods if m.rerun]
    if again:
        lines = "\n".join(_command(comparison.label(m.method), m.rerun or "") for m in again)
        opened = " open" if len(again) <= 4 else ""
        parts.append(f"<details{opened}><summary>Run one row again</summary>\n{lines}\n</details>")
    others = [m for m in comparison.methods if m.train and m not in best]
    if others:
        lines = "\n".join(_command(comparison.label(m.method), m.train or "") for m in others)
        parts.append(f"<details><summary>Train one of the others</summary>\n{lines}\n</details>")
    return "\n".join(parts) or "<p>The file names no commands.</p>"


def _command(label: str, command: str) -> str:
    name = escape(f"Copy the command for {label}")
    return (
        f'<div class="command"><span>{escape(label)}</span><code tabindex="0">{escape(command)}</code>'
        f'<button type="button" class="copy" aria-label="{name}" hidden>Copy</button></div>'
    )


def measured(header: HeaderRow) -> str:
    """How it was measured: what, with how much, on what; and what was checked for fairness."""
    data = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in header.data.items() if key != "path")
    budget = header.budget or {}
    facts = {
        "model": header.model,
        "data": f"{header.data.get('path', '')}: {data}",
        "measured by": f"{words.metric(header)} on the test set, which no choice looks at",
        "budget": _budget(budget, header.tolerance),
        "training": _training(header),
        "seeds": ", ".join(map(str, header.seeds)),
        "hardware": ": ".join(filter(None, (header.device, header.hardware))),
        "runs at once": header.jobs,
        "versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
        "commit": header.commit,
        "date": header.date,
        "command": header.command,
    }
    listed = "\n".join(f"<dt>{name}</dt><dd>{escape(str(v))}</dd>" for name, v in facts.items() if v not in (None, ""))
    checked = notes(header.fairness.checked).replace('class="notes"', 'class="checked"')
    fair = f"<h3>Checked for fairness</h3>\n{checked}" if checked else ""
    return f'<dl class="facts">\n{listed}\n</dl>\n{fair}'


def _training(header: HeaderRow) -> str:
    steps = words.count(header.steps, "step") if header.steps else ""
    epochs = f"{header.epochs:g} epoch{'' if header.epochs == 1 else 's'}" if header.epochs else ""
    return ", ".join(filter(None, (steps, epochs)))


def _budget(budget: dict[str, Any], tolerance: float | None) -> str | None:
    if not isinstance(budget.get("parameters"), int):
        return None
    within = "" if tolerance is None else f", within {100 * tolerance:g} %"
    origin = f" (those of {budget['from']})" if budget.get("from") else ""
    return f"{budget['parameters']:,} trainable adapter parameters{origin}{within}"
