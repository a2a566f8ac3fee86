"""`flashbone completion` in real shells, on a pseudo-terminal; `flashbone env`."""

import json
import os
import pty
import re
import select
import shutil
import signal
import time

import pytest

import flashbone
from flashbone import cli, floors

pytestmark = [pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]
SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


def typed(shell, script, lines, folder):
    """What the terminal shows after each line was typed, with its tabs."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(PS1="> ", TERM="dumb", HOME=str(folder), COLUMNS="300")
        os.execvp(shell, SHELLS[shell])
    shown, screens = "", []
    try:
        before = "" if shell == "bash" else "autoload -U compinit && compinit -D; "
        for text, wanted in [(f"{before}source {script}; echo re''ady\r", "ready\r"), *lines]:
            shown = ""
            os.write(terminal, text.encode())
            until = time.monotonic() + 30
            while not re.search(wanted, shown) and time.monotonic() < until:
                if select.select([terminal], [], [], 0.2)[0]:
                    shown += os.read(terminal, 4096).decode(errors="replace").replace("\x07", "")
            screens.append(shown)
            os.write(terminal, b"\x15")  # the line is cleared
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    return screens[1:]


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_commands_options_fields_and_files(shell, tmp_path, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert cli.main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "myrecipe.yaml").touch()
    lines = [
        ("flashbone compl\t", "completion"),
        ("flashbone train --training.max_st\t", r"--training\.max_steps"),
        ("flashbone chat --dtype bf\t", "bf16"),
        ("flashbone train myrec\t", r"myrecipe\.yaml"),
        ("flashbone train --resu\t", "--resume"),
    ]
    for (text, wanted), shown in zip(lines, typed(shell, script, lines, tmp_path), strict=True):
        assert re.search(wanted, shown), (text, shown)


def test_env_says_what_a_report_needs(capsys):
    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["system"]["flashbone"] == flashbone.__version__
    assert "threads" in report["devices"]["cpu"]
    assert {"torch", "peft", "trl", "transformers"} <= report["packages"].keys()
    assert report["optional parts"]["train"] == "yes"
    assert set(report["optional parts"]) >= {"train", "eval", "quant", "gguf"}
    assert cli.main(["env"]) == 0
    assert re.search(r"^  torch +\d", capsys.readouterr().out, re.MULTILINE)


def test_env_names_what_an_optional_part_lacks(monkeypatch, capsys):
    wrong = "trl>=9, but trl 1 is installed"
    monkeypatch.setattr(floors, "problems", lambda extras, but=(): {"trl>=9": wrong} if "train" in extras else {})
    assert cli.main(["env"]) == 0
    assert re.search(rf"^  train +no: {wrong}$", capsys.readouterr().out, re.MULTILINE)
