"""`flashbone chat` on a real pseudo-terminal of 80 columns, and fed by a pipe."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

import pytest

from flashbone import cli
from helpers.stand_ins import write_adapter_of
from helpers.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("work")
    write_tiny_llama(folder / "llama")
    for seed, name in enumerate(("first", "second"), 1):
        torch.manual_seed(seed)
        write_adapter_of(folder / "llama", folder / "runs" / name / "adapter")
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


def _slow_down() -> None:
    from flashbone.generation.speaker import Writing

    put = Writing.put

    def slowly(self, value):
        time.sleep(0.05)
        put(self, value)

    Writing.put = slowly


class Session:
    """A command on a terminal of its own, in a fork: what is imported here need not be imported there."""

    def __init__(self, *argv: str, slow: bool = False):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            self._child([*argv], slow)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.raw, self.shown = "", ""  # all that came, and what is left of it without the keys of the terminal

    @staticmethod
    def _child(argv: list[str], slow: bool) -> None:
        import torch

        code = 99
        try:
            torch.set_num_threads(1)  # a fork has no threads of OpenMP, and would wait for them for ever
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
            if slow:
                _slow_down()
            code = cli.main(argv)
            sys.stdout.flush()
        finally:
            os._exit(code)

    def send(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def until(self, text: str) -> str:
        """What is shown up to this text, and is taken away with it."""
        self.wait(lambda shown: text in shown)
        before, _, self.shown = self.shown.partition(text)
        return before

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until this text is shown: readline misses one that comes just before it begins to wait."""
        while text not in self.shown:
            self.send("\x03")
            assert self._read(), self.raw
        self.until(text)

    def wait(self, is_enough) -> None:
        """Read until what is shown is enough."""
        end = time.monotonic() + 60
        while not is_enough(self.shown):
            assert time.monotonic() < end, self.raw
            assert self._read(), self.raw

    def _read(self) -> bool:
        """Take what has come in a second; false if the other side is closed."""
        if select.select([self.terminal], [], [], 1)[0]:
            try:
                came = os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:
                return False
            self.raw += came
            self.shown += ESCAPES.sub("", came)
        return True

    def end(self) -> int:
        """The exit code."""
        while self._read():
            pass
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


FEW = ("--max-new-tokens", "8", "--device", "cpu")
TWO = ("--adapter", "runs/first/adapter", "--adapter", "runs/second/adapter")


def test_a_conversation_on_a_terminal(here):
    session = Session("chat", "llama", *TWO, *FEW)
    assert "llama with first, the likeliest words; /help says more, Ctrl-D ends" in session.until("> ")
    session.send("where was the cat ?\n")
    session.until("where was the cat ?\n")
    first = session.until("\n> ").strip()
    assert first
    session.send("/adapter\n")
    assert "(adapter first answers; there are *first, second)" in session.until("\n> ")
    session.send("/adapter second\n")
    assert "(adapter second answers)" in session.until("\n> ")
    session.send("/compare where was the cat ?\n")
    table = session.until("\n> ")
    assert re.search(r"base .*first .*second", table)
    assert max(map(len, re.findall("[┏┃┡│└].*", table))) == 80
    session.send("/adapter off\n")
    assert "(the base alone answers)" in session.until("\n> ")
    session.send("/bogus\n")
    assert "flashbone chat: /bogus: no such command; there are /adapter, /compare," in session.until("\n> ")
    session.send("/save talk.jsonl\n")
    assert "(saved in talk.jsonl)" in session.until("\n> ")
    (_, answer, *_) = json.loads((here / "talk.jsonl").read_text())["messages"]
    assert first.startswith(answer["content"].strip())
    session.send("/help\n")
    assert "/reset               forget what was said" in session.until("\n> ")
    session.send("/reset\n")
    assert "(forgotten)" in session.until("\n> ")
    session.send("/exit\n")
    assert session.end() == 0


def test_ctrl_c_stops_an_answer_and_not_the_program_and_ctrl_d_ends_it(here):
    session = Session("chat", "llama", "--device", "cpu", "--max-new-tokens", "200", slow=True)
    session.until("> ")
    session.send("where was the cat ?\n")
    session.until("where was the cat ?\n")
    session.wait(lambda shown: len(shown.split()) > 3)
    session.send("\x03")
    session.until("(stopped)")
    session.until("> ")
    session.interrupt("(Ctrl-D or /exit ends the conversation)")
    session.until("> ")
    session.send("\x04")
    assert session.end() == 0


def test_a_line_goes_on_after_a_backslash_and_the_last_one_comes_back(here):
    pytest.importorskip("readline")
    session = Session("chat", "llama", *FEW)
    session.until("> ")
    session.send("where was \\\n")
    session.until(". ")
    session.send("the cat ?\n")
    session.until("the cat ?\n")
    answer = session.until("\n> ").strip()
    session.send("/reset\n")
    session.until("\n> ")
    session.send("where was the cat ?\n")
    session.until("where was the cat ?\n")
    assert session.until("\n> ").strip() == answer
    session.send("/reset\n")
    session.until("\n> ")
    session.send("\x1b[A\x1b[A\n")
    session.until("cat ?\n")
    assert session.until("\n> ").strip() == answer
    session.send("\x04")
    assert session.end() == 0


def test_no_token_of_a_model_reaches_the_terminal_as_an_escape(here):
    folder = write_tiny_llama(here / "foreign")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    names = content["model"]["vocab"]
    special = {token["content"] for token in content["added_tokens"]}
    content["model"]["vocab"] = {word if word in special else f"\x1b[31m{word}\u202e": n for word, n in names.items()}
    file.write_text(json.dumps(content))
    session = Session("chat", "foreign", *FEW)
    session.until("> ")
    session.send("hi\n")
    session.until("(cut off after 8 tokens")
    session.until("> ")
    assert r"\x1b[31m" in session.raw
    assert r"\u202e" in session.raw
    session.send("/compare hi\n")
    session.until("└")
    session.until("> ")
    session.send("\x04")
    assert session.end() == 0
    assert "\x1b[31m" not in session.raw
    assert "\u202e" not in session.raw


def test_lines_from_a_pipe_are_answered_with_nothing_else_on_stdout(here, monkeypatch, capsys):
    asked = "where was the cat ?\n\n/adapter off\nwhere was the cat ?\n/nothing\nand ?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
    assert cli.main(["chat", "runs/first/adapter", *FEW]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.splitlines()[-1].startswith("flashbone chat: /nothing: no such command")


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["nowhere"], 1, "nowhere"),
        (["llama", "runs/adapter"], 2, "an adapter is --adapter runs/adapter"),
        (["llama", "--adapter", "nowhere/at/all"], 1, "nowhere/at/all"),
        (["llama", "--temperature", "-1"], 2, "--temperature: got '-1', wanted a number, 0 or more"),
        (["llama", "--top-p", "2"], 2, "--top-p: got '2'"),
        (["llama", "--temperature", "0", "--top-k", "5"], 1, "leave top_p and top_k out"),
        (["llama", "--quantization", "5"], 2, "--quantization"),
        (["llama", "--chat-template", "no.jinja"], 1, "chat_template no.jinja: no such file"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_first_prompt(here, capsys, argv, code, said):
    assert cli.main(["chat", *argv, "--device", "cpu"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err.splitlines()[-1]


def test_few_bits_without_bitsandbytes_are_one_line(here, capsys, monkeypatch):
    from flashbone.train import models

    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert cli.main(["chat", "llama", "--quantization", "4"]) == 1
    assert "bitsandbytes is not installed; pip install flashbone[quant]" in capsys.readouterr().err.splitlines()[-1]
