"""What `flashbone merge` and `flashbone unmerge` share: checkpoint, adapters and OUT as arguments, the bar, figures."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashbone.cli.terminal import progress_bars

# Not downloaded for a base: the same weights in formats that are not merged.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "original/*")


def parsed(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The arguments: positionals may stand before, between and behind the options."""
    args = parser.parse_intermixed_args(_joined(argv))
    given = [first := parser.get_default("first"), "ADAPTER", "OUT"]
    if len(args.paths) < len(given):
        parser.error(f"the following arguments are required: {', '.join(given[len(args.paths) :])}")
    setattr(args, first.lower(), args.paths[0])
    args.adapters, args.out = args.paths[1:-1], Path(args.paths[-1])
    args.weights = _weights(parser, args.weights)
    return args


def _joined(argv: list[str]) -> list[str]:
    """`--weights -0.5,1` as one word, for argparse takes `-0.5,1` for an option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--weights" and re.match(r"-[\d.].*,", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _weights(parser: argparse.ArgumentParser, given: list[str] | None) -> list[float] | None:
    words = [word for text in given or [] for word in re.split(r"[,\s]+", text) if word]
    try:
        return [float(word) for word in words] if given is not None else None
    except ValueError:
        parser.error(f"--weights: got {' '.join(words)}, wanted numbers; put it last, or write --weights 0.7,0.3")


def shared_parser(first: str, command: str, description: str) -> argparse.ArgumentParser:
    """What both commands take."""
    parser = argparse.ArgumentParser(
        prog=f"flashbone {command}",
        usage=f"flashbone {command} [options] {first} ADAPTER [ADAPTER ...] OUT",
        description=description,
        allow_abbrev=False,
    )
    parser.set_defaults(first=first)
    parser.add_argument("--weights", nargs="+", metavar="W", help="of each adapter: 0.7 0.3 at the end, or 0.7,0.3")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return parser


@contextmanager
def progress(command: str, out: Path) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; what killed runs left is named first."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    from flashbone.files import staging

    for leftover in staging.leftovers(out):
        print(
            f"flashbone {command}: {leftover} is left of a run that was killed, or is still under way", file=sys.stderr
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with progress_bars(*columns) as bar:
        task = bar.add_task(f"{command[:-1]}ing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def spent(report: Any) -> str:
    """What was written in what time, of either report."""
    return f"{report.bytes_written / 2**20:.1f} MiB in {report.seconds:.1f} s"
