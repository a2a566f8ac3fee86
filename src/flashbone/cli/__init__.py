"""The `flashbone` command: finds the subcommand, runs it, and turns failures into one line and a code."""

import importlib
import os
import sys

from flashbone import __version__, floors
from flashbone.errors import visible

# A command's module is imported only when it is asked for, so that help answers at once.
COMMANDS = {
    "train": ("flashbone.cli.train", "fine-tune a model as a YAML file says"),
    "compare": ("flashbone.cli.compare", "train methods side by side, and say which did best"),
    "eval": ("flashbone.cli.eval", "measure a model's quality, with or without an adapter"),
    "generate": ("flashbone.cli.generate", "have a model answer prompts, with any of several adapters"),
    "chat": ("flashbone.cli.chat", "talk to a model, with adapters to choose from"),
    "inspect": ("flashbone.cli.inspect", "say what an adapter would cost, or what a file holds"),
    "merge": ("flashbone.cli.merge", "write adapters into a checkpoint's weights"),
    "convert": ("flashbone.cli.convert", "write an adapter in another format, or for a serving engine"),
    "run": ("flashbone.cli.run", "run another package's command with BONE in it, such as swift or axolotl"),
    "schema": ("flashbone.cli.schema", "print the JSON schema of a recipe, for editors"),
    "completion": ("flashbone.cli.completion", "print a script that completes commands in bash or zsh"),
    "env": ("flashbone.cli.env", "print versions and devices, for a report of a bug"),
}

TRACEBACK = "--traceback"  # anywhere in a command line
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns 0 when done, 1 when the input was wrong, 2 when the command line was."""
    args = list(sys.argv[1:] if argv is None else argv)
    with_traceback = TRACEBACK in args
    args = [word for word in args if word != TRACEBACK]
    who = f"flashbone {args[0]}" if args and args[0] in COMMANDS else "flashbone"
    try:
        code = _run(args)
        if not getattr(sys.stdout, "closed", True):
            sys.stdout.flush()  # a reader that is gone shows here, not while Python closes
        return code
    except KeyboardInterrupt:
        print(f"{who}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from flashbone.cli import failures

        return failures.report(error, who, with_traceback)


def _run(args: list[str]) -> int:
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
    # Before anything imports huggingface_hub, which reads it once: TRL would report each run to the hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    floors.check()
    try:
        return importlib.import_module(COMMANDS[name][0]).run(rest)
    except SystemExit as stop:  # argparse and its kin: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _unknown(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"unknown command {visible(name)!r}; {hint}"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flashbone COMMAND ...",
            "",
            "Bone-family adapters: fine-tune, compare, try out, inspect, merge and convert.",
            "",
            "commands:",
            *lines,
            "",
            "`flashbone COMMAND --help` says what a command takes; `flashbone --version` prints the version.",
            "A failure is one line; with --traceback, in any command, all of it is printed.",
        ]
    )
