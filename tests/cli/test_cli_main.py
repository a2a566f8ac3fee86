"""The command's frame: help at once, failures in one line, exit codes."""

import errno
import os
import resource
import subprocess
import sys
import types

import pytest

import flashbone
from flashbone import cli
from flashbone.errors import ConfigError


def run_command(*args, **kwargs):
    command = [sys.executable, "-m", "flashbone", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("args", [["--help"], ["--version"]])
def test_help_and_version_answer_at_once_and_import_no_heavy_library(args):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_command(*args)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of CPU: others may be at work
    assert done.returncode == 0
    assert not done.stderr
    assert seconds < 2  # 0.03 s on an idle machine; torch alone would take this long
    check = "import sys, flashbone.cli; flashbone.cli.main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run(
        [sys.executable, "-c", check, *args], capture_output=True, text=True, timeout=60
    ).stderr.split()
    assert not {"torch", "transformers", "trl", "datasets", "peft", "matplotlib"} & set(loaded)


def test_help_names_every_command():
    text = run_command("--help").stdout
    assert all(f"  {name}  " in text for name in cli.COMMANDS)
    assert run_command("--version").stdout == f"flashbone {flashbone.__version__}\n"


def test_no_command_and_an_unknown_one_are_usage_errors(capsys):
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch):
    """Puts a function in place of the train command."""

    def put(run):
        monkeypatch.setitem(sys.modules, "flashbone.cli.train", types.SimpleNamespace(run=run))

    return put


def raising(error):
    def run(argv):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("adapter.rr: unknown"), 1, "flashbone train: error: adapter.rr: unknown\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            1,
            "flashbone train: error: runs/x: no space left on device; free some or write elsewhere\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/locked"),
            1,
            "flashbone train: error: /locked: permission denied; write elsewhere or change the folder's permissions\n",
        ),
        (KeyboardInterrupt(), 130, "flashbone train: interrupted\n"),
        (SystemExit(2), 2, ""),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_a_code(command, capsys, error, code, line):
    command(raising(error))
    assert cli.main(["train", "c.yaml"]) == code
    captured = capsys.readouterr()
    assert captured.err == line
    assert not captured.out


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), FileNotFoundError(errno.ENOENT, "gone")])
def test_bugs_keep_their_traceback(command, error):
    command(raising(error))
    with pytest.raises(type(error)):
        cli.main(["train"])


def test_helper_processes_say_who_speaks(command, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    command(raising(ConfigError("no")))
    cli.main(["train"])
    assert capsys.readouterr().err == "[process 1] flashbone train: error: no\n"


@pytest.mark.parametrize(("users", "disabled"), [(None, True), ("0", False), ("1", True)])
def test_no_command_sends_telemetry_unless_the_user_says_so(tmp_path, users, disabled):
    """Asked of huggingface_hub, whose `send_telemetry` TRL calls, in a process in which a command ran."""
    environment = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key and key != "DO_NOT_TRACK"}
    environment |= {} if users is None else {"HF_HUB_DISABLE_TELEMETRY": users}
    code = (
        "from flashbone.cli import main; assert main(['train', 'absent.yaml']) == 1;"
        "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{disabled}\n", done.stderr
