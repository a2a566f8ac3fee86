"""report.html: one file that loads nothing, from the assets beside this module and the parts of a comparison."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib.resources import files
from string import Template

from flashbone.compare.report import fragments, style, words
from flashbone.compare.report.payload import as_json, payload
from flashbone.compare.report.statistics import Ranking
from flashbone.compare.report.verdict import judge

SCRIPTS = ("svg.js", "chart.js", "curves.js", "points.js", "legend.js", "table.js", "page.js")


def page(ranking: Ranking) -> str:
    """The whole page. Its policy allows this style and this script by their hashes, and no request at all."""
    header, verdict = ranking.comparison.header, judge(ranking)
    sheet = style.css() + _asset("page.css")
    script = "\n".join(_asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; style-src {_hash(sheet)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    count = words.count(len(ranking.comparison.methods), "method")
    return Template(_asset("page.html")).substitute(
        policy=policy,
        sheet=sheet,
        script=script,
        name=escape(header.name),
        subtitle=escape(f"{count} on {header.model}"),
        best=escape(verdict.best),
        cost=escape(verdict.cost),
        notes=fragments.notes(verdict.notes),
        table=fragments.table(ranking),
        legend=fragments.legend(ranking),
        commands=fragments.commands(ranking),
        measured=fragments.measured(header),
        data=as_json(payload(ranking)),
    )


def _asset(name: str) -> str:
    return files("flashbone.compare.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
