"""The `flashbone` command: finds the subcommand, runs it, and turns failures into one line and a code."""

import errno
import importlib
import os
import sys

from flashbone import __version__, floors
from flashbone.errors import FlashboneError

# A command's module is imported only when it is asked for, so that help answers at once.
COMMANDS = {
    "train": ("flashbone.cli.train", "fine-tune a model as a YAML file says"),
    "compare": ("flashbone.cli.compare", "train methods side by side, and say which did best"),
    "eval": ("flashbone.cli.eval", "measure a model's quality, with or without an adapter"),
    "inspect": ("flashbone.cli.inspect", "say what an adapter would cost, or what a file holds"),
    "merge": ("flashbone.cli.merge", "write adapters into a checkpoint's weights"),
    "convert": ("flashbone.cli.convert", "write an adapter in another format, or for a serving engine"),
}

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns 0 when done, 1 when the input was wrong, 2 when the command line was."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args:
        print(_help(), file=sys.stderr)
        return 2
    name, rest = args[0], args[1:]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"flashbone {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"flashbone: error: {_unknown(name)}", file=sys.stderr)
        return 2
    return _guarded(name, rest)


def _guarded(name: str, args: list[str]) -> int:
    """Run the command; what a user can put right is one line on stderr, anything else is our bug and propagates."""
    # Before anything imports huggingface_hub, which reads it once: TRL would report each run to the hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        floors.check()
        return importlib.import_module(COMMANDS[name][0]).run(args)
    except FlashboneError as error:
        return _fail(name, str(error))
    except OSError as error:
        if error.errno not in _FAULTS_OF_THE_DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(name, f"{where}{_FAULTS_OF_THE_DISK[error.errno]}")
    except SystemExit as stop:  # argparse and its kin: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print(f"flashbone {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


_FAULTS_OF_THE_DISK = {
    errno.ENOSPC: "no space left on device; free some or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EACCES: "permission denied; write elsewhere or change the folder's permissions",
    errno.EFBIG: "the file is larger than the disk or a limit allows; write elsewhere, or in shards",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an error; write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
}


def _fail(name: str, message: str) -> int:
    rank = os.environ.get("RANK", "0")  # of a process that accelerate or torchrun launched
    prefix = "" if rank == "0" else f"[process {rank}] "
    print(f"{prefix}flashbone {name}: error: {message}", file=sys.stderr)
    return 1


def _unknown(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"unknown command {name!r}; {hint}"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flashbone COMMAND ...",
            "",
            "Bone-family adapters: fine-tune, compare, inspect, merge and convert.",
            "",
            "commands:",
            *lines,
            "",
            "`flashbone COMMAND --help` says what a command takes; `flashbone --version` prints the version.",
        ]
    )
