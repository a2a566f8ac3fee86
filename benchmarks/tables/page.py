"""The generated parts of docs/benchmarks.md, from the rows: tables, single figures, targets that were met."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import DTYPES
from benchmarks.errors import BenchmarkError
from benchmarks.methods import TRAINED
from benchmarks.rows import Row
from benchmarks.tables import plots
from benchmarks.tables.markdown import TITLES, cell, is_current, is_floor, table
from benchmarks.tables.targets import WIDE, met


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
    shape: dict[str, Any] = field(default_factory=dict)
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
BF16_AUTOCAST, BF16, FP32 = DTYPES.values()
SHORT = {BF16: "bf16", FP32: "fp32"}
STEP_IN_BF16 = Figure("step, autocast", ("step", "main", TIME), dtype=BF16_AUTOCAST)
MEMORY_IN_BF16 = Figure("resident MiB", ("memory", "main", "above_floor_mib"), dtype=BF16_AUTOCAST)
TRAINING = (
    (
        STEP_IN_BF16,
        Figure("step, bf16 alone", ("step", "main", TIME), dtype=BF16),
        MEMORY_IN_BF16,
        Figure("layer 4096 x 4096, bf16", ("layer", "shapes", TIME), WIDE, dtype=BF16),
    ),
    (
        Figure("step, fp32", ("step", "main", TIME)),
        Figure("resident MiB", ("memory", "main", "above_floor_mib")),
        Figure("live MiB", ("memory", "live", "above_floor_mib")),
        Figure("layer 4096 x 4096, fp32", ("layer", "shapes", TIME), WIDE),
    ),
)
DECODING = (
    Figure("one token, bf16", ("decode", "main", TIME), dtype=BF16),
    Figure("one token, fp32", ("decode", "main", TIME)),
    Figure("2048 x 2048, bf16", ("decode", "middle", TIME), dtype=BF16),
    Figure("2048 x 2048, fp32", ("decode", "middle", TIME)),
    Figure("64 x 64, fp32", ("decode", "small", TIME)),
)
KEEPING = tuple(
    Figure(f"{words}, {name}", ("memory", "alive", metric), {"base": "plain"}, dtype=dtype)
    for dtype, name in ((BF16_AUTOCAST, "autocast"), (BF16, "bf16"), (FP32, "fp32"))
    for metric, words in (("above_floor_mib", "kept MiB"), ("needed_mib", "needed"))
)
MIXING = {"batch": 1, "heads": 12, "size": 64, "tokens": 512}
RUNS = {
    "plain": "a run over 64 chats",
    "packing": "the same, packed",
    "padding-free": "the same without padding",
    "conversations": "the same as 16 conversations of four answers",
    "answers": "the same with a row for each answer",
}
FAST = ("bone", "bat-row", "miss")
LINES = (
    *(
        Figure(f"{how}, {name}, {words}", ("train", part, metric), dtype=dtype, methods=("bone", "lora", "miss"))
        for dtype, name in ((BF16_AUTOCAST, "bf16"), (FP32, "fp32"))
        for part, how in RUNS.items()
        for metric, words in (("steps_ms", "the steps"), ("above_floor_mib", "memory above the loaded model"))
    ),
    Figure("`import`", ("load", "import", "import_ms"), methods=("import-flashbone", "import-peft")),
    Figure("load an adapter", ("load", "adapter", "load_ms"), methods=("bone", "miss", "lora")),
    Figure("merge a live model, to LoRA's time", ("merge", "live", "merge_ratio"), methods=FAST),
    Figure("unmerge it, to LoRA's time", ("merge", "live", "unmerge_ratio"), methods=FAST),
    Figure("merge files", ("merge", "command", "command_ms"), methods=("merge-command", "copy")),
    *(
        Figure(
            f"{words}, {SHORT[dtype]}, to the frozen model's time",
            ("mixed", part, TIME),
            dtype=dtype,
            methods=("bone", "lora"),
            adapters=(number,),
        )
        for dtype in SHORT
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


Section = Callable[[list[Row]], str]


def filled(text: str, rows: list[Row], sections: dict[str, Section]) -> str:
    """A page with its generated parts as the rows give them; those that nobody measured stay as they are.

    Raises:
        BenchmarkError: a part's markers are missing.
    """
    for name, section in sections.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(rf"({re.escape(start)}\n+).*?(\n+{re.escape(end)})", re.S)
        if not pattern.search(text):
            raise BenchmarkError(f"the page has no place for its part {name!r}: it lacks {start} and {end}")
        if content := section(rows):
            text = pattern.sub(lambda found, content=content: found[1] + content + found[2], text)
    return text


def methods(rows: list[Row]) -> str:
    """What training costs, what a token costs, and the plot."""
    tables = [_table(figures, rows) for figures in (*TRAINING, DECODING)]
    parts = [*tables, plots.link("step")(rows)]
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


def kept(rows: list[Row]) -> str:
    """What backward keeps beside what it needs."""
    return _table(KEEPING, rows)


def step_in_bf16(rows: list[Row]) -> str:
    """The training step, its time and memory, with a column for each method."""
    time, memory = STEP_IN_BF16.found(rows), MEMORY_IN_BF16.found(rows)
    names = [name for name in IN_README if name in time and name in memory]
    lines = [
        ["time", *(f"{time[name].median:.2f}" for name in names)],
        ["GiB", *(f"{memory[name].median / 1024:.2f}" for name in names)],
    ]
    return table(["step in bf16", *(TITLES[name] for name in names)], lines) if names else ""


IN_README = ("bone", "bat-row", "bat-col", "miss", "lora", "dora", "oft", "miss-bat")
SECTIONS: dict[str, Section] = {"methods": methods, "kept": kept, "figures": figures, "targets": met}
OF_README: dict[str, Section] = {"step": step_in_bf16}
