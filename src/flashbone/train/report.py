"""The report of a training run: its losses and rotations as PNGs, its summary as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.errors import visible
from flashbone.files.outputs import read_json_lines
from flashbone.train import drawing
from flashbone.train.tasks import MEASURED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_OF_A_SAMPLE = 300  # characters
TRAIN_COLOUR, HELD_OUT_COLOUR = "#4c78a8", "#e45756"
REWARDS = (  # keys of metrics.jsonl
    ("rewards/margins", "reward margin"),
    ("rewards/accuracies", "reward accuracy"),
    ("reward", "reward"),
)
ROTATIONS = (  # keys of metrics.jsonl, see flashbone.train.monitor
    ("rotation/error", "largest entry of |QᵀQ - I|"),
    ("rotation/angle_deg", "largest rotation angle (degrees)"),
    ("rotation/grad_norm", "norm of the block's gradient"),
)


def plot_losses(metrics: Path, target: Path) -> Path:
    """Draw the losses over the steps from a metrics.jsonl, and the rewards of preferences; returns the PNG's path."""
    rows = read_json_lines(metrics)
    rewards = [(key, label) for key, label in REWARDS if any(key in row or f"eval_{key}" in row for row in rows)]
    is_classifier = any("eval_accuracy" in row for row in rows)
    unit = "" if rewards else " (cross-entropy)" if is_classifier else " (nats per token)"
    figure, panels = _figure(7 if not rewards else 12, 1 + len(rewards))
    for axes, (key, label) in zip(panels, [("loss", f"loss{unit}"), *rewards], strict=True):
        train, held_out = (
            [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in (key, f"eval_{key}")
        )
        if train:
            axes.plot(*zip(*train, strict=True), color=TRAIN_COLOUR, linewidth=1.5, label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=HELD_OUT_COLOUR, marker="o", markersize=5, label="held out")
        axes.set_ylabel(label)
        if train or held_out:
            axes.legend(frameon=False)
    return drawing.save(figure, target)


def plot_rotations(metrics: Path, target: Path) -> Path | None:
    """Draw the log of `RotationMonitor`, single modules thin, their maximum bold; returns the PNG's path, None if the
    run logged no rotations."""
    rows = [row for row in read_json_lines(metrics) if ROTATIONS[0][0] in row]
    if not rows:
        return None
    figure, panels = _figure(12, len(ROTATIONS))
    for axes, (key, label) in zip(panels, ROTATIONS, strict=True):
        modules = list(dict.fromkeys(k for row in rows for k in row if k.startswith(f"{key}/")))
        for name in [*modules, key]:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            width, alpha, name_shown = (2.0, 1.0, "largest") if name == key else (0.7, 0.35, None)
            marker = "." if len(points) == 1 else None
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, color=TRAIN_COLOUR, marker=marker, linewidth=width, alpha=alpha, label=name_shown)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        if modules:
            axes.plot([], [], color=TRAIN_COLOUR, linewidth=0.7, alpha=0.6, label=f"each of {len(modules)} modules")
            axes.legend(frameon=False)
    return drawing.save(figure, target)


def _figure(width: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, over optimiser steps."""
    from matplotlib.ticker import MaxNLocator

    figure, panels = drawing.blank((width, 4.2), columns=count)
    axes = list(panels[0])
    for panel in axes:
        panel.set_xlabel("optimiser step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def print_summary(summary: dict[str, Any], folder: Path, figures: list[Path]) -> None:
    """Print the table of a run on stdout."""
    from flashbone.printing import Console, Table

    table = Table(title=f"{summary['task']} with {summary['variant']}, block size {summary['block_size']}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in _lines(summary):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for line in _sample_lines(summary.get("samples") or []):
        console.print(line, soft_wrap=True)
    for name, path in _files(folder, figures):
        console.print(f"{name:<8} {path}", soft_wrap=True)


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table; figures that the run did not measure are left out."""
    trained, total = summary["trainable_parameters"], summary["total_parameters"]
    lines = [
        ("trainable parameters", f"{trained:,} of {total:,} ({summary['trainable_percent']:.3g} %)"),
        ("rows, training / held out", f"{_rows(summary['train_rows'])} / {summary['eval_rows']:,}"),
        ("steps (epochs)", f"{summary['steps']:,} ({summary['epochs']:.3g})"),
    ]
    if summary.get("cut_rows") or summary.get("dropped_rows"):
        lines.insert(2, ("rows, cut / dropped", f"{summary['cut_rows']:,} / {summary['dropped_rows']:,}"))
    if summary.get("best_step") is not None:
        lines.append(("best step, whose weights are kept", f"{summary['best_step']:,}"))
    if summary.get("train_loss") is not None:
        lines.append(("training loss, last", f"{summary['train_loss']:.4f}"))
    for _, key, name in MEASURED:
        before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
        if after is not None:
            start = "?" if before is None else f"{before:.4f}"
            lines.append((f"{name}, before -> after", f"{start} -> {after:.4f}"))
    rotation = summary.get("rotation") or {}
    error, angle = rotation.get("error"), rotation.get("angle_deg")
    if error is not None and angle is not None:
        lines.append(("largest rotation; |QᵀQ - I|", f"{angle:.1f}°; {error:.1e}"))
    speed = f", {summary['tokens_per_s']:,.0f} tokens/s" if summary.get("tokens_per_s") else ""
    lines.append(("training time", f"{summary['train_s']:,.1f} s{speed}"))
    lines.append((f"peak {summary['peak_of']}", f"{summary['peak_mib']:,.0f} MiB on {summary['device']}"))
    return lines


def _sample_lines(samples: list[dict[str, Any]]) -> list[str]:
    """Each sample in a few lines of its own."""
    lines = []
    for sample in samples:
        names = {"prompt": "held out", "wanted": "wanted", "before": "before", "after": "after"}
        if sample["before"] is None:
            names = {"prompt": "text", "wanted": "its class", "after": "taken for"}
        lines += [f"{shown:<9} {visible(sample[name].strip(), MOST_OF_A_SAMPLE)}" for name, shown in names.items()]
        lines.append("")
    return lines


def _rows(count: int | None) -> str:
    return "a stream" if count is None else f"{count:,}"


def _files(folder: Path, figures: list[Path]) -> list[tuple[str, Path]]:
    named = {"adapter": ["adapter"], "merged": ["merged", "merged.pth"], "metrics": ["metrics.jsonl"]}
    paths = [(name, folder / file) for name, files in named.items() for file in files]
    paths += [("plot", figure) for figure in figures]
    return [(name, path) for name, path in paths if path.exists()]
