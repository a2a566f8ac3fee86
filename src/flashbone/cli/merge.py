"""`flashbone merge BASE ADAPTER... OUT` and `flashbone unmerge MERGED ADAPTER... OUT`: adapters into the weights of a
checkpoint and out of them, one tensor in memory at a time."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashbone.cli import hub
from flashbone.errors import FlashboneError


def run(argv: list[str]) -> int:
    """Merge; bad input raises a FlashboneError, a bad command line SystemExit."""
    args = _parsed(make_parser(), argv)
    from flashbone.merge import merge_checkpoint

    base, adapters = hub.folder(args.base, _OTHER_WEIGHTS), [hub.folder(a) for a in args.adapters]
    found: list[Any] = []
    check = _check(base, adapters, args.weights, found) if args.verify else None
    with _progress("merge", args.out) as progress:
        report = merge_checkpoint(
            base,
            adapters,
            args.out,
            progress,
            weights=args.weights,
            dtype=args.dtype,
            shard_size=args.shard_size,
            check=check,
        )
    if args.json:
        said = {"verification": dataclasses.asdict(found[0])} if found else {}
        print(json.dumps(dataclasses.asdict(report) | said, default=str))
    else:
        print(
            f"{report.out}: {report.merged} tensors merged ({report.variant}), {report.replaced} replaced,"
            f" {report.copied} copied, {_spent(report)}"
        )
    return 0


def run_unmerge(argv: list[str]) -> int:
    """Take adapters out again; fails as `run` does."""
    args = _parsed(make_unmerge_parser(), argv)
    from flashbone.merge import unmerge_checkpoint

    merged, adapters = hub.folder(args.merged, _OTHER_WEIGHTS), [hub.folder(a) for a in args.adapters]
    base = None if args.base is None else hub.folder(args.base, _OTHER_WEIGHTS)
    with _progress("unmerge", args.out) as progress:
        report = unmerge_checkpoint(merged, adapters, args.out, progress, weights=args.weights, base=base)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        print(
            f"{report.out}: adapters taken out of {report.computed} tensors, {report.replaced} copied from the base,"
            f" {report.copied + report.converted} others; {_how_exact(report)}; {_spent(report)}"
        )
    return 0


def _how_exact(report: Any) -> str:
    if report.is_proved:
        return "this is the base, proved by the sha256 of every tensor"
    known = report.computed + report.converted
    proof = f"{report.proved} of {known} tensors proved by their sha256, the others" if report.proved else "they"
    how = "differ from the base by" if report.is_measured else "cannot be proved, and differ from the base by at most"
    return f"{proof} {how} {report.max_abs_error:.3g} (largest), {report.relative_rms_error:.3g} (relative RMS)"


def _spent(report: Any) -> str:
    return f"{report.bytes_written / 2**20:.1f} MiB in {report.seconds:.1f} s"


@contextmanager
def _progress(command: str, out: Path) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; what killed runs left is named first."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from flashbone.checkpoint import staging

    for leftover in staging.leftovers(out):
        print(
            f"flashbone {command}: {leftover} is left of a run that was killed, or is still under way", file=sys.stderr
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{command[:-1]}ing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _check(base: Path, adapters: list[Path], weights: list[float] | None, kept: list[Any]) -> Callable[[Path], None]:
    """What compares the finished model's logits with those of the base and its adapters, and keeps what it found.

    What it could never compare is refused at once, before anything is merged.
    """
    from flashbone.verify import check_verifiable, compare_logits

    check_verifiable(base, adapters, weights)

    def check(merged: Path) -> None:
        found = compare_logits(base, adapters, weights, merged)
        kept.append(found)
        numbers = (
            f"outputs differ by {found.relative_error:.2e} (relative RMS, {found.tokens} tokens), by"
            f" {found.unexplained:.2e} more than rounding explains"
        )
        if not found.ok:
            raise FlashboneError(
                f"verification failed: {numbers} from the unmerged model's; at most {found.limit:.2e} was wanted;"
                " nothing was written"
            )
        print(f"flashbone merge: verified, {numbers}", file=sys.stderr)

    return check


def _parsed(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
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


def _parser(first: str, command: str, description: str) -> argparse.ArgumentParser:
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


def make_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "BASE",
        "merge",
        "Write adapters into a checkpoint's weights, one tensor in memory at a time. The result is a plain model that"
        " needs no flashbone.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="BASE ADAPTER... OUT",
        help="the base model (folder of safetensors, an RWKV model's .pth, or hub id); the adapters (PEFT folder, file"
        " of RWKV-PEFT, or hub id); the merged model, which does not exist yet",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="of all floating tensors: bf16, fp16 or fp32 (the base's own)")
    parser.add_argument("--shard-size", metavar="SIZE", help="largest shard: 5GB, 500MB, 2GiB (the base's own shards)")
    parser.add_argument("--verify", action="store_true", help="reload the result and compare logits with the base's")
    return parser


def make_unmerge_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "MERGED",
        "unmerge",
        "Take adapters out of a merged model: gives the base back where the merge was not rounded, else says by how"
        " much the result differs.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="MERGED ADAPTER... OUT",
        help="the merged model; all adapters that were merged into it; the base, which does not exist yet",
    )
    parser.add_argument("--base", metavar="BASE", help="the original base, to measure the difference against")
    return parser


# Not downloaded for a base: the same weights in formats that are not merged.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "original/*")
