"""The reports as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.text import Text

from flashbone.errors import visible
from flashbone.inspect.reports import AdapterReport, Costs, LayerGroup, ModelReport, TrainedGroup
from flashbone.inspect.writing import broken, number, percent, size, sizes, times
from flashbone.printing import Console, Table

WIDE = 110  # columns of a terminal from which on shapes and shares are shown, too
SHORTEST = 24  # columns that names get at least
WHOLE = 1000  # characters of a line
NAMED = 3  # bad tensors that are named


def print_report(report: ModelReport | AdapterReport) -> None:
    """Print what an adapter on a model would cost, or what an adapter's file holds."""
    console = Console()
    if isinstance(report, ModelReport):
        title, facts = _title(report), []
        tables, notes = [_layers(report, console.width), _comparison(report)], _notes(report)
    else:
        title, facts = f"{report.adapter}: {report.layout}", _facts(report)
        tables = [_blocks(report, console.width)]
        tables += [_others(report, console.width)] if report.others else []
        tables += [_engines(report)] if report.engines else []
        notes = [_how_to_serve(report)] if report.engines and report.method != "LORA" else []
    console.print("\n".join(visible(line, WHOLE) for line in title.split("\n")), soft_wrap=True)  # paths stay whole
    for line in facts:
        console.print(visible(line, WHOLE))
    for table in tables:
        console.print()
        console.print(table)
    if notes:
        console.print()
    for note in notes:
        console.print(note)


def _name_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], columns: int, footer: Sequence[str] | None = None
) -> Table:
    """A table for a terminal of so many columns. Its first column holds dotted names, which are broken where their
    parts end; the others are flush right and not broken."""
    lines = [headers, *rows, *([footer] if footer else [])]
    widths = [max(len(part) for line in lines for part in line[i].split("\n")) for i in range(1, len(headers))]
    room = max(SHORTEST, columns - sum(widths) - 3 * len(widths) - 2)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_footer=footer is not None)
    table.add_column(headers[0], footer[0] if footer else "", overflow="fold")
    for i, header in enumerate(headers[1:], 1):
        table.add_column(header, footer[i] if footer else "", justify="right", no_wrap=True)
    for names, *cells in rows:
        table.add_row(Text(broken(visible(names), room)), *map(Text, cells))  # in lines of their own
    return table


def _title(report: ModelReport) -> str:
    settings = {**report.config}
    variant, r = settings.pop("variant"), settings.pop("r")
    settings.pop("target_modules", None)
    shown = "".join(f", {name} {value}" for name, value in settings.items() if name != "dropout" or value)
    why = " (published for this size)" if report.is_recommended else ""
    return (
        f"{report.model}: {report.architecture}, {number(report.parameters)} parameters\n"
        f"Adapter: {variant}, block size {r}{shown}{why}"
    )


def _layers(report: ModelReport, columns: int) -> Table:
    """One line for each group; shapes and shares only where there is room for them."""
    wide = columns >= WIDE

    def line(names: str, shapes: tuple[str, str], figures: LayerGroup | TrainedGroup, arithmetic: str) -> list[str]:
        trained = [number(figures.trainable_parameters), percent(figures.percent_of_base)]
        return [
            names,
            *(shapes if wide else ()),
            *trained[: 2 if wide else 1],
            size(figures.training_bytes),
            arithmetic,
        ]

    rows = [
        line(
            times(group.modules, group.layers),
            (sizes((group.out_features, group.in_features)), sizes(group.block_shape)),
            group,
            f"+{percent(group.percent_of_linears)}",
        )
        for group in report.layers
    ]
    rows += [line(times(o.names, o.count), (sizes(o.shape), ""), o, "") for o in report.others]
    headers = ["layers", *(["out x in", "block", "trained", "of base"] if wide else ["trained"])]
    costs = report.costs
    together = [number(costs.trainable_parameters), size(costs.training_bytes - report.base_bytes)]
    if wide:
        together = ["", "", together[0], percent(costs.percent_of_base), together[1]]
    footer = ["together", *together, f"+{percent(costs.percent_of_linears)}"]
    return _name_table([*headers, "training", "arithmetic"], rows, columns, footer)


def _comparison(report: ModelReport) -> Table:
    bone, lora = report.costs, report.lora
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    table.add_column(f"{bone.method}, r = {bone.r}", justify="right")
    table.add_column(f"LoRA, rank {lora.r}", justify="right")

    def trained(costs: Costs) -> str:
        return f"{costs.trainable_parameters:,} ({percent(costs.percent_of_base)})"

    for name, figure in {
        "trained parameters": trained,
        "adapter file, bytes": lambda costs: f"{costs.file_bytes:,}",
        "training memory": lambda costs: size(costs.training_bytes),
        f"  base weights, {report.dtype}": lambda costs: size(report.base_bytes),
        "  adapter weights": lambda costs: size(costs.weight_bytes),
        "  gradients and AdamW": lambda costs: size(costs.state_bytes),
        "  kept for backward": lambda costs: size(costs.activation_bytes),
        "arithmetic": lambda costs: f"+{percent(costs.percent_of_linears)}",
    }.items():
        table.add_row(name, figure(bone), figure(lora))
    return table


def _notes(report: ModelReport) -> list[str]:
    notes = [
        f"Training memory is for {report.tokens:,} tokens a step (batch x sequence, --tokens), without what the frozen"
        " base itself keeps of them. Arithmetic: multiply-adds of a forward pass, in addition to"
        f" {number(report.linear_multiply_adds)} a token in the base's linear layers."
    ]
    if report.lora.r == 1 and report.lora.trainable_parameters > report.costs.trainable_parameters:
        notes.append("A LoRA on these layers cannot be smaller than rank 1.")
    if report.assumption:
        notes.append(report.assumption)
    if report.quantised_by:
        notes.append(f"The config asks for {report.quantised_by}; these figures are those of the plain model.")
    if report.labels is not None:
        notes.append(
            f"The classification head has the config's {report.labels} labels; `flashbone train` makes one for those of"
            " the data."
        )
    published = report.recommended
    if published is None:
        notes.append("Nothing is published for models of this size; the published settings end at 13B.")
    elif not report.is_recommended:
        notes.append(
            f"Published for this size: variant orthogonal, by --adapter.bottleneck_size {published.r}"
            f" --adapter.dropout {published.dropout} --adapter.orthogonal_eps {published.orthogonal_eps:g}."
        )
    return notes


def _facts(report: AdapterReport) -> list[str]:
    variant = report.variant or ("unknown" if report.method == "BONE" else None)
    dtypes = ", ".join(f"{count} {name}" for name, count in report.dtypes.items())
    facts = [
        f"{report.method}{f', variant {variant}' if variant else ''} ({report.evidence}).",
        f"Base model: {report.base_model or 'the file names none'}.",
        f"Tensors: {dtypes}; {size(report.bytes)}, {report.file_bytes:,} bytes on disk.",
    ]
    if report.untrained:
        facts.append(f"{report.untrained} of its modules are untrained: all zero, so that nothing is added.")
    if report.not_finite:
        names = ", ".join(report.not_finite_in[:NAMED]) + (", ..." if len(report.not_finite_in) > NAMED else "")
        facts.append(f"{report.not_finite:,} values are NaN or infinite, in {names}: the adapter is broken.")
    else:
        facts.append("Every value is finite.")
    if _has_rotations(report):
        facts.append("Orthogonality errors and angles below are the largest of each line.")
    return facts


def _has_rotations(report: AdapterReport) -> bool:
    return any(group.rotation_deg is not None for group in report.blocks)


def _blocks(report: AdapterReport, columns: int) -> Table:
    headers, rows = ["modules", "block", "parameters", "size"], []
    for group in report.blocks:
        shapes = "\n".join(map(sizes, group.shapes))
        rows.append([times(group.modules, group.count), shapes, number(group.parameters), size(group.bytes)])
    footer = [
        "together",
        "",
        number(sum(g.parameters for g in report.blocks)),
        size(sum(g.bytes for g in report.blocks)),
    ]
    if _has_rotations(report):
        headers += ["|Q\u1d40Q-I|", "turns by"]
        footer += ["", ""]
        for row, group in zip(rows, report.blocks, strict=True):
            is_known = group.rotation_deg is not None
            row += [f"{group.orthogonality_error:.1e}", f"{group.rotation_deg:.1f} deg"] if is_known else ["?", "?"]
    return _name_table(headers, rows, columns, footer)


def _others(report: AdapterReport, columns: int) -> Table:
    rows = [
        [times(group.names, group.count), sizes(group.shape), number(group.parameters), size(group.bytes)]
        for group in report.others
    ]
    return _name_table(["instead of the base's", "shape", "parameters", "size"], rows, columns)


def _engines(report: AdapterReport) -> Table:
    table = Table("served by", "exactly", "how, or why not", box=box.SIMPLE_HEAD, show_edge=False)
    engines: dict[tuple[str, str], list[str]] = {}
    for engine in report.engines:
        engines.setdefault((engine.verdict, engine.how), []).append(engine.name)
    words = {"exact": "yes", "approximate": "nearly", "no": "no"}
    for (verdict, how), names in engines.items():
        table.add_row(", ".join(names), words[verdict], how)
    return table


def _how_to_serve(report: AdapterReport) -> str:
    is_approximate = any(engine.verdict == "approximate" for engine in report.engines)
    rank = " --rank N (or --error E)" if is_approximate else ""
    merging = " Merged (`flashbone merge`), any engine serves it." if report.method == "BONE" else ""
    return f"To LoRA: `flashbone convert ADAPTER OUT --to lora --base BASE{rank}`.{merging}"
