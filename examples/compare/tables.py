"""Fill what docs/comparing.md says of comparisons from the results that are kept beside this file.

python -m examples.compare.tables [--check]
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

from flashbone.compare.reading import read_results
from flashbone.compare.report import words
from flashbone.compare.report.statistics import Bootstrap, rank
from flashbone.compare.report.tables import markdown, results_table
from flashbone.compare.report.verdict import judge
from flashbone.compare.results import ComparisonResults

RESULTS = Path("examples/compare/results")
SHOWN = ("method", "test", "size", "rate", "step_ms", "above_model_mib")
PAGE = Path("docs/comparing.md")


def main(args: list[str]) -> int:
    """Write the page, or with --check only say by the exit code whether it is as the results are."""
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, RESULTS)
    if args == ["--check"]:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


def filled(text: str, folder: Path) -> str:
    """A page with what is between its markers as the results say it: `section` or `claims of NAME`."""
    for results in sorted(folder.glob("*/results.jsonl")):
        for what, write in (("section", section), ("claims", claims)):
            start, end = f"<!-- {what} of {results.parent.name} -->", f"<!-- end of {results.parent.name} -->"
            pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
            content = f"{start}\n{write(results)}\n{end}"
            text = pattern.sub(lambda _, content=content: content, text)
    return text


def section(results: Path) -> str:
    """Verdict, notes, the columns that decide, where it was measured, and the curves of one comparison."""
    comparison = read_results(results)
    judged, header = judge(rank(comparison)), comparison.header
    table = results_table(rank(comparison))
    table = replace(table, columns=tuple(column for column in table.columns if column.key in SHOWN))
    place = f"../{results.parent.as_posix()}"
    parts = [
        f"> {judged.text}",
        "\n".join(f"- {note}" for note in judged.notes),
        markdown(table).strip(),
        f"{header.hardware}, {header.date}, commit {header.commit}. [All figures and versions]({place}/results.jsonl).",
        f"![Learning curves of {results.parent.name}]({place}/learning_curves.png)",
    ]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def claims(results: Path) -> str:
    """What the comparison says of "outperforms LoRA", and where it is two epochs long, of "converges quickly"."""
    comparison = read_results(results)
    header, bootstrap = comparison.header, Bootstrap(comparison)
    lines = []
    for key in ("bone", "bat-row", "bat-col", "orthogonal"):
        if key in {method.method for method in comparison.methods}:
            lead = bootstrap.difference(key, "lora")
            verdict = "tied" if lead.tied else "better" if lead.mean > 0 else "worse"
            lines.append(f"{comparison.label(key)} {verdict}, {words.lead(header, lead)}")
    text = f"Leads over LoRA in test {words.metric(header)}, 95% intervals: {'; '.join(lines)}."
    if header.epochs >= 2:
        shares = [
            f"{comparison.label(key)} {100 * first_epoch(comparison, key):.0f}%" for key in ("bone", "lora", "full")
        ]
        text += (
            f"\n\nOf the fall of the held-out loss in {header.epochs:g} epochs, the first made: {', '.join(shares)}."
        )
    return text


def first_epoch(comparison: ComparisonResults, method: str) -> float:
    """The share of the fall in held-out loss that the first epoch made, over the counted runs."""
    shares = []
    for run in comparison.counted(method):
        curve = run.held_out
        end = min(curve.step, key=lambda step: abs(step - curve.step[-1] / comparison.header.epochs))
        losses = dict(zip(curve.step, curve.loss, strict=True))
        shares.append((curve.loss[0] - losses[end]) / (curve.loss[0] - curve.loss[-1]))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
