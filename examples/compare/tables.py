"""Fill what pages say of comparisons from the results that are kept beside this file, whichever way they fall.

python -m examples.compare.tables [--check]
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from flashbone.compare.reading import read_results
from flashbone.compare.report import words
from flashbone.compare.report.ranking import Ranking, rank
from flashbone.compare.report.statistics import Bootstrap, Difference
from flashbone.compare.report.tables import markdown, results_table
from flashbone.compare.report.verdict import judge

RESULTS = Path("examples/compare/results")
PAGES = tuple(map(Path, ("README.md", "docs/choosing.md", "docs/comparing.md", "docs/results.md")))
SHOWN = ("method", "test", "size", "rate", "steps", "lead", "step_ms", "above_model_mib")
TASKS = {"classification": "BBC news", "gsm8k": "GSM8K", "sft": "chats", "topics": "topics of exchanges"}
VARIANTS = ("bone", "bat-row", "bat-col", "orthogonal", "mini")
RATES = ("| task | `bone` | / 3, x 3 | LoRA | / 3, x 3 |", "|---|---|---|---|---|")
BETTER = ("better", "worse")
NUMBERS = ("no", "one", "two", "three", "four", "five")


def main(args: list[str]) -> int:
    """Write the pages, or with --check only say by the exit code whether they are as the results are."""
    parts, wrong = measured(RESULTS), []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before, parts)
        if before != after and args == ["--check"]:
            wrong.append(page)
        elif before != after:
            page.write_text(after, encoding="utf-8")
    return int(bool(wrong))


def filled(text: str, parts: dict[str, str]) -> str:
    """A page with what is between the markers of each part as the results say it; lines of a block stay its own."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->)(\n?).*?(\n?)(<!-- end of {name} -->)", re.S)
        text = pattern.sub(lambda found, part=part: f"{found[1]}{found[2]}{part}{found[3]}{found[4]}", text)
    return text


def measured(folder: Path) -> dict[str, str]:
    """All parts by their names."""
    kept = {file.parent.name: file for file in sorted(folder.glob("*/results.jsonl"))}
    ranked = {name: rank(read_results(file)) for name, file in kept.items()}
    parts = {f"section {name}": section(ranking, kept[name].parent) for name, ranking in ranked.items()}
    parts |= {f"leads {name}": leads_on(ranking) for name, ranking in ranked.items()}
    everywhere = "both" if len(ranked) == 2 else f"all {NUMBERS[len(ranked)]}"
    of_test = [(*who, lead) for name, ranking in ranked.items() for who, lead in test_leads(name, ranking, "lora")]
    of_bat = [(*who, lead) for name, ranking in ranked.items() for who, lead in test_leads(name, ranking, "bone")]
    of_speed = [(*who, lead) for name, ranking in ranked.items() for who, lead in speed_leads(name, ranking)]
    best = [
        f"{ranking.results.label(ranking.winner)} was best on {TASKS[name]}"
        for name, ranking in ranked.items()
        if ranking.winner is not None
    ]
    return parts | {
        "quality": "; ".join([f"With tuned learning rates, {summed(of_test, 'LoRA', everywhere, BETTER)}", *best]),
        "bat": summed([row for row in of_bat if row[0].startswith("bat")], "`bone`", everywhere, BETTER),
        "speed": summed(of_speed, "LoRA", everywhere, ("faster", "slower")),
        "steps": "; ".join(steps_to(TASKS[name], ranking) for name, ranking in ranked.items()),
        "leads": "; ".join(f"{TASKS[name]}: {leads_of(ranking, 'lora')}" for name, ranking in ranked.items()),
        "bat leads": "; ".join(f"{TASKS[name]}: {leads_of(ranking, 'bone')}" for name, ranking in ranked.items()),
        "rates": "\n".join(["", *RATES, *(rates(TASKS[name], ranking) for name, ranking in ranked.items()), ""]),
    }


def leads_of(ranking: Ranking, other: str) -> str:
    """The variants' leads over another method on the test set of one task; over Bone those of `bat` alone."""
    rows = [(key, lead) for (key, _), lead in test_leads(next(iter(TASKS)), ranking, other)]
    shown = [(key, lead) for key, lead in rows if other != "bone" or key.startswith("bat")]
    return ", ".join(f"`{key}` {words.lead(ranking.results.header, lead)}" for key, lead in shown)


def section(ranking: Ranking, folder: Path) -> str:
    """Verdict, notes, the columns that decide, where it was measured, and the curves of one comparison."""
    judged, header, place = judge(ranking), ranking.results.header, f"../{folder.as_posix()}"
    table = results_table(ranking)
    table = replace(table, columns=tuple(column for column in table.columns if column.key in SHOWN))
    parts = [
        f"> {judged.text}",
        "\n".join(f"- {note}" for note in judged.notes),
        markdown(table).strip(),
        f"{header.hardware}, {header.date}, commit {header.commit}. [All figures and versions]({place}/results.jsonl).",
        f"![Learning curves of {folder.name}]({place}/learning_curves.png)",
    ]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def variants_of(ranking: Ranking) -> list[str]:
    """The variants that have a figure."""
    return [key for key in VARIANTS if key in ranking.estimates]


def test_leads(task: str, ranking: Ranking, other: str) -> Iterator[tuple[tuple[str, str], Difference]]:
    """(variant, task) with its lead over another method on the test set."""
    bootstrap = Bootstrap(ranking.results)
    for key in variants_of(ranking):
        if key != other and other in ranking.estimates and (lead := bootstrap.difference(key, other)):
            yield (key, TASKS[task]), lead


def speed_leads(task: str, ranking: Ranking) -> Iterator[tuple[tuple[str, str], Difference]]:
    """(variant, task) with its lead over LoRA on the way."""
    for key in variants_of(ranking):
        speed = ranking.speeds.methods.get(key) if ranking.speeds else None
        if speed and speed.lead:
            yield (key, TASKS[task]), speed.lead


def summed(rows: list[tuple[str, str, Difference]], other: str, everywhere: str, pair: tuple[str, str]) -> str:
    """Who was told apart from the other method, and where; ties are counted."""
    apart = [
        f"`{key}` {pair[0] if lead.mean > 0 else pair[1]} than {other} on {task}"
        for key, task, lead in rows
        if not lead.tied
    ]
    if not apart:
        return f"every variant that ran tied with {other} on {everywhere} of our tasks"
    ties = len(rows) - len(apart)
    return f"{'; '.join(apart)}" + (f"; tied in the other {ties} of {len(rows)} cases" if ties else "")


def leads_on(ranking: Ranking) -> str:
    """The variants' leads over LoRA on the test set of one task."""
    header, lines = ranking.results.header, []
    for (key, _), lead in test_leads(next(iter(TASKS)), ranking, "lora"):
        verdict = "tied" if lead.tied else "better" if lead.mean > 0 else "worse"
        lines.append(f"{ranking.results.label(key)} {verdict}, {words.lead(header, lead)}")
    return f"Leads over LoRA in test {words.metric(header)}, 95% intervals: {'; '.join(lines)}."


def steps_to(task: str, ranking: Ranking) -> str:
    """The variants' steps to LoRA's last held-out loss on one task."""
    speeds = ranking.speeds
    assert speeds is not None, task
    steps = (
        f"`{key}` {words.until(speeds.methods[key].steps)}" for key in variants_of(ranking) if key in speeds.methods
    )
    return f"{task}, of {speeds.end}: {', '.join(steps)}"


def rates(task: str, ranking: Ranking) -> str:
    """A row: the best rate of Bone and of LoRA on one task, and what a third and three times it cost."""
    table = {row.method: row.cells for row in results_table(ranking).rows}
    cells: Callable[[str], str] = lambda key: f"{table[key]['rate'].text} | {table[key]['leeway'].text}"  # noqa: E731
    return f"| {task} | {cells('bone')} | {cells('lora')} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
