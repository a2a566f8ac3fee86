"""`flashbone merge BASE ADAPTER OUT`: write an adapter into a checkpoint's weights, one tensor in memory at a time."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from flashbone.cli import hub


def run(argv: list[str]) -> int:
    """Parse, merge, print; bad input raises a FlashboneError, a bad command line SystemExit."""
    args = _parser().parse_args(argv)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from flashbone.checkpoint import staging
    from flashbone.merge import merge_checkpoint

    base, adapter = hub.folder(args.base, _OTHER_WEIGHTS), hub.folder(args.adapter)
    for leftover in staging.leftovers(args.out):
        print(f"flashbone merge: {leftover} is left of a run that was killed, or is still under way", file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("merging", total=None)
        report = merge_checkpoint(
            base, adapter, args.out, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        print(
            f"{report.out}: {report.merged} tensors merged ({report.variant}), {report.replaced} replaced,"
            f" {report.copied} copied, {report.bytes_written / 2**20:.1f} MiB in {report.seconds:.1f} s"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone merge",
        description="Write an adapter into a checkpoint's weights, one tensor in memory at a time. The result is a"
        " plain model that needs no flashbone.",
    )
    parser.add_argument("base", metavar="BASE", help="the base model: folder of safetensors, or hub id")
    parser.add_argument("adapter", metavar="ADAPTER", help="the BONE adapter: PEFT folder, or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the merged model: a folder that does not exist yet")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return parser


# Not downloaded for a base: the same weights in formats that are not merged.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "original/*")
