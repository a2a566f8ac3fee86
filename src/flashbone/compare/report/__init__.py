"""The report of a comparison, from its results.jsonl alone: statistics, verdict, tables, figures, page."""

from __future__ import annotations

from pathlib import Path

from flashbone.compare.reading import read_results
from flashbone.compare.report.figures import charts, draw_png
from flashbone.compare.report.page import page
from flashbone.compare.report.ranking import rank
from flashbone.compare.report.tables import markdown, results_table, terminal
from flashbone.compare.report.verdict import judge
from flashbone.files.outputs import write_text

MOST_OF_A_LINE = 2000  # characters of the verdict on a terminal


def write_report(results: Path, folder: Path) -> list[Path]:
    """Write report.html and its charts as PNGs into `folder`, each whole or not at all; returns their paths.

    The comparison may be unfinished: the report is of what has run so far.

    Raises:
        FormatError: the results are not what `flashbone compare` writes.
    """
    ranking = rank(read_results(results))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "report.html"
    write_text(target, page(ranking))
    return [target, *(draw_png(chart, ranking.results, folder) for chart in charts(ranking))]


def print_comparison(results: Path) -> None:
    """Print the verdict and the tables of a comparison on stdout.

    Raises:
        FormatError: the results are not what `flashbone compare` writes.
    """
    from rich.text import Text

    from flashbone.errors import one_line
    from flashbone.printing import Console

    ranking = rank(read_results(results))
    verdict, console = judge(ranking), Console()
    for table in terminal(results_table(ranking), ranking.results.header.name):
        console.print(table)
    console.print(Text(one_line(verdict.text, MOST_OF_A_LINE), style="bold"))
    for note in verdict.notes:
        console.print(one_line(f"- {note}", MOST_OF_A_LINE))


def comparison_markdown(results: Path) -> str:
    """The table of a comparison in Markdown, for pages that are generated from it.

    Raises:
        FormatError: the results are not what `flashbone compare` writes.
    """
    return markdown(results_table(rank(read_results(results))))
