"""The report on a model as tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashbone.inspect.data import Costs, LayerGroup, ModelReport, TrainedGroup
from flashbone.inspect.layout import name_table
from flashbone.inspect.words import number, percent, size, sizes, times

WIDE = 110  # columns of a terminal from which on shapes and shares are shown, too


def print_model(report: ModelReport) -> None:
    """Print what an adapter on a model would cost."""
    console = Console()
    console.print(Text(_title(report)), soft_wrap=True)
    for table in (_layers(report, console.width), _comparison(report)):
        console.print()
        console.print(table)
    console.print()
    for note in _notes(report):
        console.print(Text(note))


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
        wider = [number(figures.trainable_parameters), percent(figures.percent_of_base)]
        return [names, *(shapes if wide else ()), *wider[: 2 if wide else 1], size(figures.training_bytes), arithmetic]

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
    headers = [
        "layers",
        *(["out x in", "block", "trained", "of base"] if wide else ["trained"]),
        "training",
        "arithmetic",
    ]
    costs = report.costs
    together = [number(costs.trainable_parameters), size(costs.training_bytes - report.base_bytes)]
    if wide:
        together = ["", "", together[0], percent(costs.percent_of_base), together[1]]
    footer = ["together", *together, f"+{percent(costs.percent_of_linears)}"]
    return name_table(headers, rows, columns, footer)


def _comparison(report: ModelReport) -> Table:
    bone, lora = report.costs, report.lora
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    table.add_column(f"{bone.method}, r = {bone.r}", justify="right")
    table.add_column(f"LoRA, rank {lora.r}", justify="right")

    def row(name: str, ours: str, theirs: str) -> None:
        table.add_row(Text(name), Text(ours), Text(theirs))

    def trained(costs: Costs) -> str:
        return f"{costs.trainable_parameters:,} ({percent(costs.percent_of_base)})"

    row("trained parameters", trained(bone), trained(lora))
    row("adapter file, bytes", f"{bone.file_bytes:,}", f"{lora.file_bytes:,}")
    row("training memory", size(bone.training_bytes), size(lora.training_bytes))
    row(f"  base weights, {report.dtype}", size(report.base_bytes), size(report.base_bytes))
    row("  adapter weights", size(bone.weight_bytes), size(lora.weight_bytes))
    row("  gradients and AdamW", size(bone.state_bytes), size(lora.state_bytes))
    row("  kept for backward", size(bone.activation_bytes), size(lora.activation_bytes))
    row("arithmetic", *(f"+{percent(c.percent_of_linears)}" for c in (bone, lora)))
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
    if report.recommended is None:
        notes.append("Nothing is published for models of this size; the published settings end at 13B.")
    elif not report.is_recommended:
        published = report.recommended
        notes.append(
            f"Published for this size: bottleneck_size {published.r}, dropout {published.dropout}, orthogonal_eps"
            f" {published.orthogonal_eps:g}."
        )
    return notes
