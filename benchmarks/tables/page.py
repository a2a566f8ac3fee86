"""The generated parts of docs/benchmarks.md, from the rows: tables, single figures, targets that were met."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.errors import BenchmarkError
from benchmarks.methods import TRAINED
from benchmarks.rows import Row
from benchmarks.tables import plots
from benchmarks.tables.markdown import TITLES, cell, is_current, is_floor, table
from benchmarks.tables.targets import WIDE, met

NOT_YET = "Not measured yet."


@dataclass(frozen=True)
class Figure:
    """One figure of each method: which rows hold it.

    Attributes:
        name: Its place on the page, in words.
        rows: Benchmark, part and metric.
        shape: Entries of the shape that the rows must have.
        threads: As the end of the rows' device has them; empty: whatever they are.
        methods: Those that it is shown for on a line of its own; none for a column of the table.
    """

    name: str
    rows: tuple[str, str, str]
    shape: dict[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    threads: str = ""
    methods: tuple[str, ...] = ()
    adapters: tuple[int, ...] = (0, 1)

    def found(self, rows: list[Row]) -> dict[str, Row]:
        """The row of each method in the latest run; of frozen bases the one beside today's PEFT."""
        fitting = [
            row
            for row in rows
            if (row.benchmark, row.part, row.metric) == self.rows
            and (row.dtype, row.adapters in self.adapters) == (self.dtype, True)
            and row.device.endswith(self.threads)
            and self.shape.items() <= row.shape.items()
            and (is_current(row) or not is_floor(row))
        ]
        latest = max((row.date for row in fitting), default="")
        return {row.method: row for row in fitting if row.date == latest}


TIME = "time_ratio"
TRAINING = (
    Figure("training step", ("step", "main", TIME)),
    Figure("resident MiB", ("memory", "main", "above_floor_mib")),
    Figure("live MiB", ("memory", "live", "above_floor_mib")),
    Figure("layer 4096 x 4096", ("layer", "shapes", TIME), WIDE),
)
DECODING = (
    Figure("one token, bf16", ("decode", "main", TIME), dtype="bfloat16"),
    Figure("one token, fp32", ("decode", "main", TIME)),
)
MIXING = {"batch": 1, "heads": 12, "size": 64, "tokens": 512}
FAST = ("bone", "bat-row", "miss")
LINES = (
    Figure("`import`", ("load", "import", "import_ms"), methods=("import-flashbone", "import-peft")),
    Figure("load an adapter", ("load", "adapter", "load_ms"), methods=("bone", "miss", "lora")),
    Figure("merge a live model, to LoRA's time", ("merge", "live", "merge_ratio"), methods=FAST),
    Figure("unmerge it, to LoRA's time", ("merge", "live", "unmerge_ratio"), methods=FAST),
    Figure("merge files", ("merge", "command", "command_ms"), methods=("merge-command", "copy")),
    *(
        Figure(
            f"{words}, to the frozen model's time", ("mixed", part, TIME), methods=("bone", "lora"), adapters=(number,)
        )
        for part, words in (("prefill", "32 rows of 16 tokens"), ("decode", "32 rows of one token"))
        for number in (1, 8)
    ),
    Figure(
        "forward of BERT-base, to the frozen model's time",
        ("forward", "main", TIME),
        threads=", 1 thread",
        methods=("orthogonal", "orthogonal-merged", "lora"),
    ),
    *(
        Figure(
            f"RWKV-{version}'s time mixing, to its time in chunks, {words}",
            ("wkv", part, TIME),
            {"version": version, **MIXING},
            threads=", 1 thread",
            methods=("wkv-loop",),
        )
        for version in (7, 6)
        for part, words in (("training", "with backward"), ("forward", "forward alone"))
    ),
)


def filled(text: str, rows: list[Row]) -> str:
    """The page with all its generated parts as the rows give them.

    Raises:
        BenchmarkError: a part's markers are missing.
    """
    for name, section in SECTIONS.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
        if not pattern.search(text):
            raise BenchmarkError(f"the page has no place for its part {name!r}: it lacks {start} and {end}")
        content = f"{start}\n\n{section(rows) or NOT_YET}\n\n{end}"
        text = pattern.sub(lambda _, content=content: content, text)
    return text


def methods(rows: list[Row]) -> str:
    """What training costs, what a token costs, and the plot."""
    parts = [_table(TRAINING, rows), _table(DECODING, rows), plots.link("step")(rows)]
    return "\n\n".join(part for part in parts if part)


def _table(figures: tuple[Figure, ...], rows: list[Row]) -> str:
    """A line for each method that has one of the figures; figures that nobody measured have no column."""
    columns = {figure.name: found for figure in figures if (found := figure.found(rows))}
    lines = []
    for name in TRAINED:
        if name != "frozen" and any(name in found for found in columns.values()):
            lines.append([TITLES[name], *(_short(found[name]) if name in found else "" for found in columns.values())])
    return table(["method", *columns], lines) if lines else ""


def _short(row: Row) -> str:
    """Memory without its spread, which is a few MiB, and without the unit, which the head has."""
    return f"{row.median:,.0f}" if row.metric.endswith("_mib") else cell(row)


def figures(rows: list[Row]) -> str:
    """The figures that only some methods have, one line each."""
    lines = []
    for figure in LINES:
        found = figure.found(rows)
        shown = [f"{TITLES[name]} {cell(found[name])}" for name in figure.methods if name in found]
        if shown:
            several = f", {figure.adapters[0]} adapters in turn" if figure.adapters[0] > 1 else ""
            lines.append(f"- {figure.name}{several}: {'; '.join(shown)}")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[list[Row]], str]] = {"methods": methods, "figures": figures, "targets": met}
