"""The report on an adapter as tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashbone.inspect.data import AdapterReport, BlockGroup
from flashbone.inspect.layout import name_table
from flashbone.inspect.words import number, size, sizes, times

NAMED = 3  # bad tensors that are named


def print_adapter(report: AdapterReport) -> None:
    """Print what an adapter's file holds."""
    console = Console()
    console.print(Text(f"{report.adapter}: {report.layout}"), soft_wrap=True)
    for line in _facts(report):
        console.print(Text(line))
    tables = [_blocks(report, console.width)]
    tables += [_others(report, console.width)] if report.others else []
    tables += [_engines(report)] if report.engines else []
    for table in tables:
        console.print()
        console.print(table)
    if report.engines and report.method != "LORA":
        console.print()
        console.print(Text(_way_out(report)))


def _way_out(report: AdapterReport) -> str:
    is_approximate = any(engine.verdict == "approximate" for engine in report.engines)
    size = " --rank N (or --error E)" if is_approximate else ""
    merging = " Merged (`flashbone merge`), any engine serves it." if report.method == "BONE" else ""
    return f"To LoRA: `flashbone convert ADAPTER OUT --to lora --base BASE{size}`.{merging}"


def _facts(report: AdapterReport) -> list[str]:
    variant = report.variant or ("not said" if report.method == "BONE" else None)
    what = report.method + (f", variant {variant}" if variant else "")
    dtypes = ", ".join(f"{count} {name}" for name, count in report.dtypes.items())
    facts = [f"{what} ({report.evidence})."]
    facts.append(f"Base model: {report.base_model or 'the file does not say'}.")
    facts.append(f"Tensors: {dtypes}; {size(report.bytes)}, {report.file_bytes:,} bytes on disk.")
    if report.untrained:
        facts.append(f"{report.untrained} of its modules are untrained: all zero, so that nothing is added.")
    if report.not_finite:
        names = ", ".join(report.not_finite_in[:NAMED]) + (", ..." if len(report.not_finite_in) > NAMED else "")
        facts.append(f"{report.not_finite:,} values are NaN or infinite, in {names}: the adapter is broken.")
    else:
        facts.append("Every value is finite.")
    if _turns(report):
        facts.append("Orthogonality errors and angles below are the largest of each line.")
    return facts


def _blocks(report: AdapterReport, columns: int) -> Table:
    turns = _turns(report)
    rows = [
        [
            times(group.modules, group.count),
            "\n".join(map(sizes, group.shapes)),
            number(group.parameters),
            size(group.bytes),
            *(_rotation(group) if turns else ()),
        ]
        for group in report.blocks
    ]
    headers = ["modules", "block", "parameters", "size", *(["|Q\u1d40Q-I|", "turns by"] if turns else [])]
    parameters, total = sum(group.parameters for group in report.blocks), sum(group.bytes for group in report.blocks)
    footer = ["together", "", number(parameters), size(total), *(["", ""] if turns else [])]
    return name_table(headers, rows, columns, footer)


def _turns(report: AdapterReport) -> bool:
    return any(group.rotation_deg is not None for group in report.blocks)


def _rotation(group: BlockGroup) -> tuple[str, str]:
    if group.rotation_deg is None:
        return "?", "?"
    return f"{group.orthogonality_error:.1e}", f"{group.rotation_deg:.1f} deg"


def _others(report: AdapterReport, columns: int) -> Table:
    rows = [
        [times(group.names, group.count), sizes(group.shape), number(group.parameters), size(group.bytes)]
        for group in report.others
    ]
    return name_table(["instead of the base's", "shape", "parameters", "size"], rows, columns)


def _engines(report: AdapterReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for header in ("served by", "exactly", "how, or why not"):
        table.add_column(header)
    verdicts: dict[tuple[str, str], list[str]] = {}
    for engine in report.engines:
        verdicts.setdefault((engine.verdict, engine.how), []).append(engine.name)
    words = {"exact": "yes", "approximate": "nearly", "no": "no"}
    for (verdict, how), names in verdicts.items():
        table.add_row(Text(", ".join(names)), words[verdict], Text(how))
    return table
