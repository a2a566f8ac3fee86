"""`flashbone merge BASE ADAPTER... OUT`: adapters into the weights of a checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flashbone.cli import hub
from flashbone.cli.places import expand
from flashbone.cli.terminal import in_colour, name_leftovers, progress_bars
from flashbone.errors import FlashboneError

if TYPE_CHECKING:
    from flashbone.merge.verify import Verification

# Not downloaded for a base: the same weights in formats that cannot be merged into.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "original/*")


def run(argv: list[str]) -> int:
    """Merge; bad input raises a FlashboneError, a bad command line SystemExit."""
    parser = make_parser()
    args = parser.parse_intermixed_args(_joined(argv))
    expand(args, "paths")
    weights = _weights(parser, args.weights)
    names = ["BASE", "ADAPTER", "OUT"]
    if len(args.paths) < len(names):
        parser.error(f"the following arguments are required: {', '.join(names[len(args.paths) :])}")
    from flashbone.merge import merge_checkpoint

    base, adapters = hub.folder(args.paths[0], OTHER_WEIGHTS), [hub.folder(path) for path in args.paths[1:-1]]
    out = Path(args.paths[-1])
    verifications: list[Verification] = []
    check = _check(base, adapters, weights, verifications) if args.verify else None
    with _progress(out) as progress:
        report = merge_checkpoint(
            base,
            adapters,
            out,
            progress,
            weights=weights,
            dtype=args.dtype,
            shard_size=args.shard_size,
            check=check,
        )
    if args.json:
        verification = {"verification": dataclasses.asdict(verifications[0])} if verifications else {}
        print(json.dumps(dataclasses.asdict(report) | verification, default=str))
    else:
        print(
            f"{report.out}: {report.merged} tensors merged ({report.variant}), {report.replaced} replaced,"
            f" {report.copied} copied, {report.bytes_written / 2**20:.1f} MiB in {report.seconds:.1f} s"
            + (
                f"\n{report.untrained} of the merged tensors are as in the base: their blocks are zero, untrained"
                if report.untrained
                else ""
            )
            + (f"\n{report.beside}" if report.beside else "")
        )
    return 0


def _joined(argv: list[str]) -> list[str]:
    """The arguments with `--weights -0.5,1` as one word; argparse would take `-0.5,1` for an option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--weights" and re.match(r"-[\d.].*,", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _weights(parser: argparse.ArgumentParser, texts: list[str] | None) -> list[float] | None:
    if texts is None:
        return None
    words = [word for text in texts for word in re.split(r"[,\s]+", text) if word]
    try:
        return [float(word) for word in words]
    except ValueError:
        parser.error(f"--weights: got {' '.join(words)}, wanted numbers; put it last, or write --weights 0.7,0.3")


@contextmanager
def _progress(out: Path) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; names what killed runs left."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    name_leftovers("merge", out)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with progress_bars(*columns) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _check(
    base: Path, adapters: list[Path], weights: list[float] | None, verifications: list[Verification]
) -> Callable[[Path], None]:
    """A function that compares the finished model with the base and its adapters, and adds the outcome to the list.

    What cannot be compared at all is refused now, before anything is merged.
    """
    from flashbone.merge.verify import check_verifiable, compare_logits

    check_verifiable(base, adapters, weights)

    def check(merged: Path) -> None:
        verification = compare_logits(base, adapters, weights, merged)
        verifications.append(verification)
        if not verification.ok:
            raise FlashboneError(f"verification FAILED: {_outcome(verification)}; nothing was written")
        print(f"flashbone merge: {in_colour('OK:', 32)} {_outcome(verification)}", file=sys.stderr)

    return check


def _outcome(verification: Verification) -> str:
    """`outputs agree to 1.1e-6 (limit 3e-5)`, and what else was compared."""
    within = verification.unexplained <= verification.limit
    words = f"outputs {'agree to' if within else 'differ by'} {verification.unexplained:.1e}"
    words += f" (limit {verification.limit:.0e}"
    if verification.rounding > verification.unexplained:
        words += f"; rounding to {verification.dtype} adds {verification.rounding:.1e}"
    words += ")"
    if verification.answer_tokens:
        same = "is the same" if verification.same_answer else "differs"
        words += f", and an answer of {verification.answer_tokens} tokens {same}"
    return words.replace("e-0", "e-")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone merge",
        usage="flashbone merge [options] BASE ADAPTER [ADAPTER ...] OUT",
        description="Write adapters into a checkpoint's weights, one tensor in memory at a time. The result is a plain"
        " model that needs no flashbone.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="BASE ADAPTER... OUT",
        help="the base model (folder of safetensors, an RWKV model's .pth, or hub id); the adapters (PEFT folder, file"
        " of RWKV-PEFT, or hub id); the merged model, which does not exist yet",
    )
    parser.add_argument("--weights", nargs="+", metavar="W", help="of each adapter: 0.7 0.3 at the end, or 0.7,0.3")
    parser.add_argument("--dtype", metavar="DTYPE", help="of all floating tensors: bf16, fp16 or fp32 (the base's own)")
    parser.add_argument("--shard-size", metavar="SIZE", help="largest shard: 5GB, 500MB, 2GiB (the base's own shards)")
    parser.add_argument(
        "--verify", action="store_true", help="reload the result, compare its logits with the unmerged model's"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return parser
