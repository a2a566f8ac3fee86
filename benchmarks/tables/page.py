"""The generated parts of docs/benchmarks.md: what stands between its markers, from the rows alone."""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.errors import BenchmarkError
from benchmarks.rows import Row
from benchmarks.tables import plots
from benchmarks.tables.markdown import caption, is_current, is_floor, label, pivot
from benchmarks.tables.targets import targets_table

NOT_YET = "Not measured yet."


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


def _groups(rows: list[Row], benchmark: str, part: str) -> list[list[Row]]:
    """The rows of a part, by run."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if (row.benchmark, row.part) == (benchmark, part):
            groups.setdefault(row.group, []).append(row)
    return list(groups.values())


def _section(
    benchmark: str,
    part: str,
    what: str,
    wanted: Callable[[Row], bool],
    column: Callable[[Row], str],
    name: Callable[[Row], str] = label,
    first: str = "method",
) -> Callable[[list[Row]], str]:
    """A table for each run of a part: its caption below, one line a method, columns of the wanted rows."""

    def section(rows: list[Row]) -> str:
        found = [[row for row in group if wanted(row)] for group in _groups(rows, benchmark, part)]
        return "\n\n".join(f"{pivot(group, name, column, first)}\n\n{caption(group, what)}" for group in found if group)

    return section


def _title(row: Row) -> str:
    """The method without the number of its adapters, where that has columns of its own."""
    return label(row).partition(", ")[0]


def _size(row: Row) -> str:
    return ", ".join(str(row.shape[key]) for key in ("tokens", "in", "out"))


def _tokens(row: Row) -> str:
    return f"{row.shape['batch']} x {row.shape['seq']} tokens"


def _relative(metric: str, of_floor: str) -> Callable[[Row], bool]:
    """One metric of the methods, and for the floor what they are related to; the old PEFT's floor is left out."""
    return lambda row: row.metric == of_floor and is_current(row) if is_floor(row) else row.metric == metric


def _methods(metric: str) -> Callable[[Row], bool]:
    return lambda row: row.metric == metric and not is_floor(row)


def _either(*wanted: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: any(want(row) for want in wanted)


def _all(metrics: list[str]) -> Callable[[Row], bool]:
    return lambda row: row.metric in metrics and (is_current(row) or not is_floor(row))


def _metric(row: Row) -> str:
    return row.metric.rpartition("_")[0].replace("_", " ") + (", ratio" if row.metric.endswith("ratio") else "")


def _layer(part: str, wanted: Callable[[Row], bool], column: Callable[[Row], str]) -> Callable[[list[Row]], str]:
    name = label if part == "shapes" else _title
    return _section(
        "layer",
        part,
        "Forward and backward, ratio to the frozen layer (of that itself, its time)",
        wanted,
        column,
        name,
    )


def _memory(part: str, wanted: Callable[[Row], bool], column: Callable[[Row], str]) -> Callable[[list[Row]], str]:
    name = label if part in ("main", "live") else _title
    what = "Peak memory above the frozen model's (of that itself, its peak)"
    if part == "live":
        what = "The same of what is alive, without the holes that the allocator leaves between tensors"
    return _section("memory", part, what, wanted, column, name)


def _mixing(row: Row) -> str:
    """What is mixed: a version, a size, a number of tokens."""
    shape = row.shape
    size = f"{shape['batch']} x {shape['heads']} x {shape['size']}"
    return f"RWKV-{shape['version']}, {size}, {shape['tokens']:,} tokens"


def _loop_or_chunks(row: Row) -> str:
    if row.metric == "time_ratio":
        return "loop / chunks"
    return label(row) + (", saved" if row.metric == "saved_mib" else "")


def _wkv(part: str, what: str) -> Callable[[list[Row]], str]:
    def wanted(row: Row) -> bool:
        return row.metric in ("time_ms", "saved_mib") or (row.metric, row.method) == ("time_ratio", "wkv-loop")

    return _section("wkv", part, what, wanted, _loop_or_chunks, _mixing, "sequences")


def _one_after_the_other(*sections: Callable[[list[Row]], str]) -> Callable[[list[Row]], str]:
    return lambda rows: "\n\n".join(text for section in sections if (text := section(rows)))


SECTIONS: dict[str, Callable[[list[Row]], str]] = {
    "targets": targets_table,
    "layer": _one_after_the_other(
        _layer("shapes", _relative("time_ratio", "time_ms"), _size),
        _layer("tokens", _relative("time_ratio", "time_ms"), lambda row: f"{row.shape['tokens']} tokens"),
        _layer("r", _methods("time_ratio"), lambda row: f"r = {row.r}"),
        _layer("adapters", _methods("time_ratio"), lambda row: f"{row.adapters} active"),
    ),
    "step": _one_after_the_other(
        _section("step", "main", "Ratio to the frozen model's step", _all(["time_ms", "time_ratio"]), _metric),
        _section("step", "targets", "The methods of the targets alone", _all(["time_ms", "time_ratio"]), _metric),
        plots.link("step"),
    ),
    "memory": _one_after_the_other(
        _memory("main", _either(_relative("above_floor_mib", "peak_mib"), _methods("peak_mib")), _metric),
        _memory("live", _either(_relative("above_floor_mib", "peak_mib"), _methods("peak_mib")), _metric),
        _memory("tokens", _relative("above_floor_mib", "peak_mib"), _tokens),
        _memory("r", _methods("above_floor_mib"), lambda row: f"r = {row.r}"),
        _memory("adapters", _methods("above_floor_mib"), lambda row: f"{row.adapters} active"),
        plots.link("memory"),
    ),
    "decode": _section(
        "decode", "main", "One token, ratio to the frozen layer", _all(["time_ms", "time_ratio"]), _metric
    ),
    "mixed": _one_after_the_other(
        _section("mixed", "prefill", "Ratio to the model without adapters", _all(["time_ms", "time_ratio"]), _metric),
        _section("mixed", "decode", "Ratio to the model without adapters", _all(["time_ms", "time_ratio"]), _metric),
    ),
    "forward": _section(
        "forward",
        "main",
        "Inference of BERT-base, ratio to the frozen model",
        _all(["time_ms", "time_ratio"]),
        _metric,
    ),
    "load": _one_after_the_other(
        _section("load", "import", "Ratio to `import peft`", _all(["import_ms", "import_ratio"]), _metric),
        _section("load", "adapter", "Ratio to LoRA", _all(["load_ms", "load_ratio"]), _metric),
    ),
    "merge": _one_after_the_other(
        _section(
            "merge",
            "live",
            "Ratio to LoRA",
            _all(["merge_ms", "merge_ratio", "unmerge_ms", "unmerge_ratio"]),
            _metric,
        ),
        _section("merge", "command", "Ratio to a copy of the files", _all(["command_ms", "command_ratio"]), _metric),
    ),
    "wkv": _one_after_the_other(
        _wkv("training", "Forward and backward; batch x heads x features of a head"),
        _wkv("forward", "Forward alone, in inference mode; batch x heads x features of a head"),
    ),
}
