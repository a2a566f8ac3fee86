"""`flashbone run NAME ARGS`: another package's console script, with PEFT's BONE method in it and in its processes."""

import argparse
import difflib
import os
import shutil
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path

from flashbone.errors import ConfigError, visible

_CHILDREN = Path(__file__).parent.parent / "hosts" / "children"


def run(argv: list[str]) -> int:
    """Hand over to a console script, in this process; its exit code, or 1 after the traceback of what it raised."""
    args = make_parser().parse_args(argv)
    scripts = {script.name: script for script in entry_points(group="console_scripts")}
    if args.name not in scripts:
        near = difflib.get_close_matches(args.name, scripts, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "is its package installed in this environment?"
        raise ConfigError(f"{visible(args.name)}: no installed package has a console script of that name; {hint}")
    paths = [str(_CHILDREN), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    sys.argv = [shutil.which(args.name) or args.name, *args.arguments]
    try:
        return scripts[args.name].load()() or 0
    except Exception:
        traceback.print_exc()  # the script's own, as it would be without flashbone
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone run",
        description="Run another package's command with PEFT's BONE method in it, and in all processes that it starts.",
        epilog="example: flashbone run swift sft --tuner_type bone --reft_rank 64 ...",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the command, such as swift, axolotl or trl")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments, as they are")
    return parser
