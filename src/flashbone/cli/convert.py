"""`flashbone convert ADAPTER OUT --to FORMAT`: write an adapter in another format, or for a serving engine."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from flashbone.cli import hub
from flashbone.cli.places import expand
from flashbone.cli.terminal import name_leftovers, progress_bars
from flashbone.errors import visible

EPILOG = """\
formats:
  peft       the BONE folder of PEFT 0.14 to 0.18 and flashbone
  miss       the MISS folder of PEFT 0.17 and newer (bone, mini, bat-col)
  lora       a plain LoRA folder: exact for bone and mini, by a truncated SVD for the others (--rank or --error)
  rwkv-peft  the .pth file of RWKV-PEFT (bone, bat-row)
  gguf       a LoRA in GGUF, for llama.cpp and Ollama
  mlx        a LoRA folder of mlx-lm, for Apple silicon
"""


def run(argv: list[str]) -> int:
    """Parse, convert, print; bad input raises a FlashboneError, a bad command line SystemExit."""
    parser = make_parser()
    args = parser.parse_args(argv)
    expand(args, "adapter", "out", "base")
    if args.to is None and args.engine is None:
        parser.error("one of --to FORMAT and --for ENGINE is needed")
    from flashbone.conversion import convert

    name_leftovers("convert", args.out)
    with progress_bars() as bar:
        task = bar.add_task("converting", total=None)
        report = convert(
            hub.folder(args.adapter),
            args.out,
            args.to,
            engine=args.engine,
            base=None if args.base is None else hub.folder(args.base),
            rank=args.rank,
            error=args.error,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        _print(report)
    return 0


def _print(report: Any) -> None:
    rank = f", rank {report.rank}" if report.rank is not None else ""
    how = "exact" if report.exact else "approximate"
    replaced = f" and {report.replaced} whole tensors" if report.replaced else ""
    print(f"{report.out}: {report.modules} modules{replaced}, {report.variant} to {report.format}{rank}, {how}")
    shown = 10
    if report.errors:
        print(f"relative error of the delta, the worst of {len(report.errors)} modules first:")
        for module in report.errors[:shown]:
            print(f"  {module.error:.2e}  rank {module.rank:<5}  {visible(module.name)}")
    if report.beside:
        print(report.beside)
    if report.serve:
        print(f"serve it:\n{report.serve}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone convert",
        description="Write an adapter in another format, or as a serving engine wants it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT folder, file of RWKV-PEFT, or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder or file, which does not exist yet")
    parser.add_argument("--to", metavar="FORMAT", help="one of the formats below")
    parser.add_argument(
        "--for", dest="engine", metavar="ENGINE", help="a serving engine, such as vllm, llama.cpp, ollama or mlx"
    )
    parser.add_argument("--base", metavar="BASE", help="the base model (folder, .pth or hub id), for lora, gguf, mlx")
    parser.add_argument("--rank", type=int, metavar="N", help="rank of the LoRA (the adapter's r where it is exact)")
    parser.add_argument("--error", type=float, metavar="E", help="or the largest relative error of a module's delta")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser
