"""`roofline`: what methods would cost on a device, predicted from the kernels that they launch. Nothing is run.

With `--gpu cpu` this CPU's peaks are measured, a layer is predicted and measured, and both are printed side by side.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import AUTOCAST, DTYPES, FROZEN, Case, Setting
from benchmarks.errors import UsageError
from benchmarks.methods import CURRENT, METHODS, TRAINED, load_hosts
from benchmarks.rounds import Plan, in_workers
from benchmarks.rows import Row, current_commit, spread
from benchmarks.workers import Pool

NAMES = tuple(name for name in TRAINED if METHODS[name].worker == CURRENT)
VALIDATED = ((1024, 1536, 1536), (512, 576, 1536), (256, 2048, 2048))  # tokens, in, out


@dataclass(frozen=True)
class Prediction:
    """Of one method on one piece of work: launches, bytes and seconds, as it is written and as compiled."""

    launches: float
    bytes: float
    time_s: float
    compiled_launches: float
    compiled_s: float

    def plus(self, other: Prediction, times: float = 1) -> Prediction:
        """With `times` another one after it."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Prediction(*(mine + times * theirs for mine, theirs in pairs))


def predict(kernels: list[Any], device: Any) -> Prediction:
    """The prediction for the kernels of a piece of work."""
    from benchmarks.roofline.kernels import fused

    compiled = fused(kernels)
    seconds = [sum(map(device.time_s, some)) for some in (kernels, compiled)]
    return Prediction(len(kernels), sum(k.bytes for k in kernels), seconds[0], len(compiled), seconds[1])


def predictions(
    model: str, device: Any, tokens: int, dtype: str, names: Sequence[str], r: int
) -> dict[str, dict[str, Prediction]]:
    """Part (a layer from the hidden size to the inner one, a block, a training step) -> method -> its prediction."""
    from benchmarks.roofline import work

    config = work.config_of(model)
    blocks, base_dtype = config.num_hidden_layers, dtype.removesuffix(AUTOCAST)
    parts: dict[str, dict[str, Prediction]] = {"layer": {}, "block": {}, "step": {}}
    for name in dict.fromkeys(("frozen", *names)):
        setting = FROZEN if name == "frozen" else Setting(name, r)
        layer = work.layer(setting, tokens, config.hidden_size, config.intermediate_size, base_dtype)
        one, two = (
            predict(work.step(config, setting, tokens, base_dtype, dtype != base_dtype, n), device) for n in (1, 2)
        )
        block = two.plus(one, -1)
        parts["layer"][name] = predict(layer, device)
        parts["block"][name], parts["step"][name] = block, one.plus(block, blocks - 1)
    return parts


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options."""
    command.add_argument("--model", default="llama-3.1-8b", help="a folder with a config.json, or the name of a shape")
    command.add_argument("--gpu", default="h100", help="a100, h100, h200, l4, rtx4090; cpu: this one, measured as well")
    command.add_argument("--tokens", type=int, default=8192, help="of a batch (default: 8192)")
    command.add_argument("--dtype", choices=DTYPES, default="bf16")
    command.add_argument("--methods", default=",".join(NAMES), help=f"a,b,c of: {', '.join(NAMES)}")
    command.add_argument("--r", type=int, default=64)
    command.add_argument("--threads", type=int, default=1, help="with --gpu cpu (default: 1)")
    command.add_argument("--kernels", metavar="METHOD", help="what this method launches more than the frozen layer")
    command.add_argument("--quick", action="store_true", help="with --gpu cpu: tiny sizes")


def main(given: argparse.Namespace, pool: Pool | None = None) -> int:
    """Predict and print; the exit code.

    Raises:
        UsageError: the model or the device is unknown.
    """
    from benchmarks.roofline.devices import GPUS

    names = tuple(filter(None, given.methods.split(",")))
    if unknown := {*names, given.kernels or "bone"} - {*NAMES}:
        raise UsageError(f"roofline: got {', '.join(sorted(unknown))}, wanted some of {', '.join(NAMES)}")
    if given.gpu != "cpu" and given.gpu not in GPUS:
        raise UsageError(f"--gpu: got {given.gpu}, wanted cpu or one of {', '.join(GPUS)}")
    dtype = DTYPES[given.dtype]
    if given.gpu != "cpu" or given.kernels:
        load_hosts(CURRENT)
    if given.kernels:
        return _print_kernels(given, dtype)
    if given.gpu == "cpu":
        with nullcontext(pool) if pool else Pool(given.threads) as used:
            return _print_validation(validate(used, names, dtype, given.r, given.quick))
    device = GPUS[given.gpu]
    name = Path(given.model).name
    for part, found in predictions(given.model, device, given.tokens, dtype, names, given.r).items():
        _print(f"{part} of {name}, {given.tokens} tokens, {given.dtype}: PREDICTED for {device.name}", found)
    return 0


def beside(pool: Pool, case: Case, settings: list[Setting], plan: Plan) -> list[Row]:
    """Of a layer on this machine, predicted and measured milliseconds: of both the best, since a roofline is made of
    peaks. The device's peaks are measured before and after, as others may use the machine as well."""
    (worker,) = pool.get(CURRENT)
    asked = {
        "case": case.to_dict(),
        "settings": [vars(setting) for setting in (FROZEN, *settings)],
        "threads": pool.threads,
    }
    before = worker.ask("predict", **asked)["predicted_ms"]
    samples = in_workers(pool, case, settings, FROZEN, plan)
    after = worker.ask("predict", **asked)["predicted_ms"]
    rows = []
    for sample, predicted in zip(samples, map(min, before, after), strict=True):
        figures = {"predicted_ms": [predicted], "measured_ms": [min(sample.figures["time_ms"])]}
        about = {"device": sample.about["device"], "versions": sample.about["versions"], **dated()}
        rows += [
            Row(
                "roofline",
                "layer",
                **vars(sample.setting),
                shape=case.shape,
                dtype=case.dtype,
                metric=metric,
                **spread(values),
                **about,
            )
            for metric, values in figures.items()
        ]
    return rows


def predict_layer(case: Case, settings: list[Setting], threads: int) -> list[float]:
    """Milliseconds of a layer with each setting, by the peaks of this machine; in a worker."""
    from benchmarks.roofline import work
    from benchmarks.roofline.devices import measured

    device, shape = measured(case.device, threads, case.base_dtype), case.shape
    sizes = shape["tokens"], shape["in"], shape["out"], case.base_dtype
    return [predict(work.layer(setting, *sizes), device).time_s * 1e3 for setting in settings]


def validate(pool: Pool, names: Sequence[str], dtype: str, r: int, quick: bool) -> list[Row]:
    """Predicted and measured, of a layer of several sizes on this CPU."""
    settings = [Setting(name, 8 if quick else r) for name in names if name != "frozen"]
    plan = Plan(2 if quick else 12, 1)
    cases = [
        Case("layer", {"tokens": tokens, "in": into, "out": out}, dtype.removesuffix(AUTOCAST))
        for tokens, into, out in (((64, 64, 64),) if quick else VALIDATED)
    ]
    return [row for case in cases for row in beside(pool, case, settings, plan)]


def pairs(rows: list[Row]) -> list[tuple[Row, float, float]]:
    """The rows of `beside` by twos: the measured one, and both its figures."""
    predicted = {(str(row.shape), row.method): row.median for row in rows if row.metric == "predicted_ms"}
    measured = [row for row in rows if row.metric == "measured_ms"]
    return [(row, predicted[str(row.shape), row.method], row.median) for row in measured]


def dated() -> dict[str, str]:
    """Commit and date of a row."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    return {"commit": current_commit(), "date": now}


def _print(title: str, found: dict[str, Prediction]) -> None:
    frozen = found["frozen"]
    lines = [
        [
            METHODS[name].title,
            f"{p.launches:,.0f}",
            f"{p.bytes / 2**30:,.2f}",
            f"{p.time_s * 1e3:,.2f}",
            f"{p.time_s / frozen.time_s:.3f}",
            f"{p.compiled_launches:,.0f}",
            f"{p.compiled_s / frozen.compiled_s:.3f}",
        ]
        for name, p in found.items()
    ]
    head = ["method", "launches", "GiB moved", "ms", "ratio", "launches if fused", "ratio if fused"]
    _table(title, head, lines)


def _print_validation(rows: list[Row]) -> int:
    found = pairs(rows)
    frozen = {str(row.shape): (predicted, measured) for row, predicted, measured in found if row.method == "frozen"}
    lines = []
    for row, predicted, measured in found:
        below = frozen[str(row.shape)]
        ratios = predicted / below[0], measured / below[1]
        figures = [f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured - 1:+.0%}"]
        shape = " x ".join(str(size) for size in row.shape.values())
        lines.append([shape, METHODS[row.method].title, *figures, *(f"{ratio:.2f}" for ratio in ratios)])
    head = ["tokens x in x out", "method", "predicted ms", "measured ms", "off by", "predicted ratio", "measured ratio"]
    _table(f"a layer, forward and backward: predicted and measured, {rows[0].device}", head, lines)
    return 0


def _print_kernels(given: argparse.Namespace, dtype: str) -> int:
    from benchmarks.roofline import work
    from benchmarks.roofline.kernels import more

    config = work.config_of(given.model)
    sizes = given.tokens, config.hidden_size, config.intermediate_size, dtype.removesuffix(AUTOCAST)
    settings = Setting(given.kernels, given.r), FROZEN
    adapted, frozen = (work.layer(setting, *sizes) for setting in settings)
    lines = [[name, f"{launches:+d}", f"{size / 2**20:+,.2f}"] for name, launches, size in more(adapted, frozen)]
    _table(f"{given.kernels}: what a layer launches beside the frozen one", ["operation", "launches", "MiB"], lines)
    return 0


def _table(title: str, head: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name in ("method", "operation", head[0]) else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
