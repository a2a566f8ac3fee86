"""`flashbone completion bash|zsh`: a script that completes commands, options and the fields of recipes."""

import argparse
import contextlib
import importlib

from flashbone.errors import FlashboneError

EPILOG = """\
bash:  flashbone completion bash > ~/.local/share/bash-completion/completions/flashbone
zsh:   flashbone completion zsh > ~/.flashbone.zsh, and in ~/.zshrc, after compinit:  source ~/.flashbone.zsh
"""
# Nothing is asked of Python while one types: the words are in the script. Files come where no word fits.
SCRIPT = """\
_flashbone() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words
  if (( COMP_CWORD == 1 )); then
    words={commands}
  else
    case ${{COMP_WORDS[1]}}:${{COMP_WORDS[COMP_CWORD-1]}} in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _flashbone flashbone
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def run(argv: list[str]) -> int:
    """Parse, print."""
    options = make_parser().parse_args(argv)
    print((ZSH if options.shell == "zsh" else "") + script(), end="")
    return 0


def script() -> str:
    """The completions as a script for bash."""
    from flashbone.cli import COMMANDS

    cases = []
    for name in COMMANDS:
        parser = importlib.import_module(f"flashbone.cli.{name}").make_parser()
        words = _fields(name)
        for action in parser._actions:
            choices = " ".join(map(str, action.choices or ()))
            if choices and action.option_strings:
                before = "|".join(f"{name}:{option}" for option in action.option_strings)
                cases.append(f"      {before}) words='{choices}';;")
            words += action.option_strings or choices.split()
        cases.append(f"      {name}:*) words='{' '.join(words)}';;")
    return SCRIPT.format(commands=f"'{' '.join(COMMANDS)}'", cases="\n".join(cases))


def _fields(command: str) -> list[str]:
    """The fields of a command's file as flags; none where what they belong to is not installed."""
    if command not in ("train", "compare"):
        return []
    from flashbone.cli.schema import schema_of

    with contextlib.suppress(ImportError, FlashboneError):
        whole = schema_of(command)
        flags = [*whole["properties"], *(name for name in whole["definitions"] if "." in name)]
        return [f"--{name}" for name in flags if "-" not in name]
    return []


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone completion",
        description="Print a script that completes commands, options and the fields of recipes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=["bash", "zsh"], help="whose script")
    return parser
