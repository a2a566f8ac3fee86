"""`flashbone chat MODEL [--adapter A ...]`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone import floors
from flashbone.cli.asking import add_decoding, add_model, decoding_of, model_of, with_one_model
from flashbone.cli.terminal import set_up_notices
from flashbone.errors import LINES, FlashboneError, escaped, one_line, visible

if TYPE_CHECKING:
    from flashbone.generation.chat import Chat

EPILOG = """\
in the conversation:
  /adapter NAME|off    answer with another adapter, or with the base alone
  /compare [QUESTION]  base and adapters side by side (alone: once more)
  /system [TEXT]       another system prompt, or none
  /reset               forget what was said
  /save FILE           write the conversation, a row for `flashbone train`
  /help, /exit

Ctrl-C stops an answer, Ctrl-D ends. A line ending in \\ goes on in the next.

examples:
  flashbone chat runs/first/merged
  flashbone chat MODEL --adapter runs/first/adapter --adapter runs/second/adapter --temperature 0.7
"""
PROMPT, MORE = "> ", ". "


def run(argv: list[str]) -> int:
    """Talk until the input ends; answers go to stdout, everything else to stderr."""
    args = with_one_model(make_parser(), argv)
    floors.check("train")
    set_up_notices()
    with _loading(args.model):
        from transformers.utils.logging import disable_progress_bar

        from flashbone.generation.chat import Chat
        from flashbone.generation.speaker import load_speaker

        disable_progress_bar()
        speaker = load_speaker(model_of(args))
        chat = Chat(speaker, decoding_of(args), next(iter(speaker.keys), None), args.system)
    return Terminal(chat).run()


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """A sign of life on a terminal, gone when the model is there."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    with console.status(Text(f"loading {visible(model)}")) if console.is_terminal else contextlib.nullcontext():
        yield


class Terminal:
    """Reads lines and shows answers."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.commands: dict[str, Callable[[str], Any]] = {
            "adapter": self._adapter,
            "compare": self._compare,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "help": lambda text: self._note("\n\n".join(EPILOG.split("\n\n")[:2]) + "\n"),
        }

    def run(self) -> int:
        """The conversation; 0 when it ends."""
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() a history and keys to edit with
        self._note(self._title())
        while True:
            try:
                line = self._read()
            except EOFError:
                self._note("")
                return 0
            except KeyboardInterrupt:
                self._note("\n(Ctrl-D or /exit ends the conversation)")
                continue
            if line in ("/exit", "/quit"):
                return 0
            try:
                self._act(line)
            except KeyboardInterrupt:
                self._note("\n(stopped)")
            except FlashboneError as error:
                print(f"flashbone chat: {one_line(error)}", file=sys.stderr)
                self._note("")

    def _read(self) -> str:
        """The next line that is not blank, with those that it goes on in."""
        line = ""
        while not line.strip():
            line = input(PROMPT if self.is_terminal else "")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(MORE if self.is_terminal else "")
        return line.strip()

    def _act(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, text = line[1:].partition(" ")
        if name not in self.commands:
            known = ", ".join(f"/{command}" for command in (*self.commands, "exit"))
            raise FlashboneError(f"/{visible(name)}: no such command; there are {known}")
        self.commands[name](text.strip())

    def _answer(self, question: str) -> None:
        began = False

        def write(words: str) -> None:
            nonlocal began
            words = words if began else words.lstrip()
            began = began or bool(words)
            print(escaped(words, LINES), end="", flush=True)

        ended = self.chat.say(question, write)
        print("\n" if self.is_terminal else "", flush=True)
        if not began:
            self._note("(no answer; the question is forgotten)\n")
        elif not ended:
            self._note(f"(cut off after {self.chat.decoding.max_new_tokens} tokens; --max-new-tokens allows more)\n")

    def _adapter(self, name: str) -> None:
        if name:
            self.chat.use(None if name == "off" else name)
        names = ", ".join(f"{'*' if key == self.chat.adapter else ''}{key}" for key in self.chat.speaker.keys)
        now = f"adapter {self.chat.adapter}" if self.chat.adapter else "the base alone"
        self._note(f"({now} answers{f'; there are {names}' if names and not name else ''})\n")

    def _compare(self, question: str) -> None:
        from rich.text import Text

        from flashbone.printing import Console, Table

        console = Console()
        with console.status("answering") if self.is_terminal else contextlib.nullcontext():
            answers = list(self.chat.compare(question or None))
        table = Table(expand=True)
        for name, _ in answers:
            table.add_column(visible(name), ratio=1, overflow="fold")
        table.add_row(*(Text(escaped(answer.strip(), LINES)) for _, answer in answers))
        console.print(table, end="\n\n" if self.is_terminal else "\n")

    def _system(self, text: str) -> None:
        self.chat.system, self.chat.memory = text or None, None
        self._note(f"(system prompt: {visible(text) if text else 'none'})\n")

    def _reset(self, text: str) -> None:
        self.chat.reset()
        self._note("(forgotten)\n")

    def _save(self, file: str) -> None:
        if not file:
            raise FlashboneError("/save: give a file, as in /save talk.jsonl")
        self.chat.save(Path(file).expanduser())
        self._note(f"(saved in {visible(file)})\n")

    def _title(self) -> str:
        chat = self.chat
        how = "sampling" if chat.decoding.samples else "the likeliest words"
        who = f" with {chat.adapter}" if chat.adapter else ""
        return f"{visible(chat.speaker.base)}{who}, {how}; /help says more, Ctrl-D ends\n"

    def _note(self, text: str) -> None:
        """What is not the model's, on a terminal alone: a program that reads the answers gets nothing else."""
        if self.is_terminal:
            print(text, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone chat",
        description="Talk to a model, with adapters to choose from.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model(parser)
    add_decoding(parser, seed=None)
    return parser
