"""`flashbone merge BASE ADAPTER... OUT`: adapters into the weights of a checkpoint, one tensor in memory at a time."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashbone.cli import hub
from flashbone.cli.checkpoints import OTHER_WEIGHTS, parsed, progress, shared_parser, spent
from flashbone.errors import FlashboneError


def run(argv: list[str]) -> int:
    """Merge; bad input raises a FlashboneError, a bad command line SystemExit."""
    args = parsed(make_parser(), argv)
    from flashbone.merge import merge_checkpoint

    base, adapters = hub.folder(args.base, OTHER_WEIGHTS), [hub.folder(a) for a in args.adapters]
    found: list[Any] = []
    check = _check(base, adapters, args.weights, found) if args.verify else None
    with progress("merge", args.out) as told:
        report = merge_checkpoint(
            base,
            adapters,
            args.out,
            told,
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
            f" {report.copied} copied, {spent(report)}"
        )
    return 0


def _check(base: Path, adapters: list[Path], weights: list[float] | None, kept: list[Any]) -> Callable[[Path], None]:
    """What compares the finished model's logits with those of the base and its adapters, and keeps what it found.

    What it could never compare is refused at once, before anything is merged.
    """
    from flashbone.merge.verify import check_verifiable, compare_logits

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


def make_parser() -> argparse.ArgumentParser:
    parser = shared_parser(
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
