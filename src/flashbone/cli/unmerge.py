"""`flashbone unmerge MERGED ADAPTER... OUT`: adapters out of the weights of a merged checkpoint again."""

import argparse
import dataclasses
import json
from typing import Any

from flashbone.cli import hub
from flashbone.cli.checkpoints import OTHER_WEIGHTS, parsed, progress, shared_parser, spent


def run(argv: list[str]) -> int:
    """Take adapters out again; bad input raises a FlashboneError, a bad command line SystemExit."""
    args = parsed(make_parser(), argv)
    from flashbone.merge import unmerge_checkpoint

    merged, adapters = hub.folder(args.merged, OTHER_WEIGHTS), [hub.folder(a) for a in args.adapters]
    base = None if args.base is None else hub.folder(args.base, OTHER_WEIGHTS)
    with progress("unmerge", args.out) as told:
        report = unmerge_checkpoint(merged, adapters, args.out, told, weights=args.weights, base=base)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        print(
            f"{report.out}: adapters taken out of {report.computed} tensors, {report.replaced} copied from the base,"
            f" {report.copied + report.converted} others; {_how_exact(report)}; {spent(report)}"
        )
    return 0


def _how_exact(report: Any) -> str:
    if report.is_proved:
        return "this is the base, proved by the sha256 of every tensor"
    known = report.computed + report.converted
    proof = f"{report.proved} of {known} tensors proved by their sha256, the others" if report.proved else "they"
    how = "differ from the base by" if report.is_measured else "cannot be proved, and differ from the base by at most"
    return f"{proof} {how} {report.max_abs_error:.3g} (largest), {report.relative_rms_error:.3g} (relative RMS)"


def make_parser() -> argparse.ArgumentParser:
    parser = shared_parser(
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
