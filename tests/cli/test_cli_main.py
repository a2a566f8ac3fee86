"""The command's frame: help at once, failures in one line, exit codes."""

import errno
import os
import resource
import subprocess
import sys
import types

import jinja2
import pytest
import yaml

import flashbone
from flashbone import cli
from flashbone.errors import ConfigError, one_line, visible


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


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many open files; raise the limit with `ulimit -n`"),
        (MemoryError(), "not enough memory; use a smaller model or batch"),
        (RecursionError("maximum recursion depth exceeded"), "is nested too deeply: maximum recursion depth"),
        (jinja2.exceptions.SecurityError("no"), "the chat template does what templates may not do: no"),
        (jinja2.TemplateSyntaxError("odd\nend", 3), "the chat template is malformed: odd"),
        (jinja2.TemplateError("roles must alternate"), "the chat template cannot be rendered: roles must"),
        (yaml.YAMLError("tab"), "a YAML file is malformed: tab"),
        (ZeroDivisionError("\x1b[2Jours"), "ZeroDivisionError: \\x1b[2Jours, raised by test_cli_main; a file or"),
        (FileNotFoundError(errno.ENOENT, "gone"), "FileNotFoundError: [Errno 2] gone, raised by"),
    ],
)
def test_what_other_libraries_raise_is_one_line_that_says_how_to_report_it(command, capsys, error, line):
    command(raising(error))
    assert cli.main(["train"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("flashbone train: error: ")
    assert line in printed
    assert ("--traceback" in printed) == ("raised by" in printed)


def test_a_bug_of_ours_is_called_one(command, capsys):
    code = compile("def run(argv):\n    assert not argv, 'odd'", "run.py", "exec")
    ours = {"__name__": "flashbone.train.run"}
    exec(code, ours)
    command(ours["run"])
    assert cli.main(["train", "a"]) == 1
    assert "AssertionError: odd; this is a bug of flashbone" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--traceback", "train", "c.yaml"], ["train", "--traceback", "c.yaml"]])
def test_traceback_prints_all_wherever_it_comes(command, capsys, args):
    given = []

    def run(argv):
        given.extend(argv)
        raise ConfigError("no") from KeyError("inner")

    command(run)
    assert cli.main(args) == 1
    lines = capsys.readouterr().err.splitlines()
    assert given == ["c.yaml"]
    assert lines[0] == "KeyError: 'inner'"
    assert any("in run" in line for line in lines)
    assert lines[-1] == "flashbone train: error: no"


def test_a_long_error_names_the_first_few_the_count_and_the_remedy(command, capsys):
    names = [f"model.layers.{n}.q_proj: got 4 x 4, wanted 8 x 8" for n in range(300)]
    command(raising(ConfigError("; ".join(["the adapter does not fit", *names, "was r changed?"]))))
    cli.main(["train"])
    line = capsys.readouterr().err
    assert len(line) < 500 + len("flashbone train: error: \n") + 1
    assert "layers.0.q_proj" in line
    assert "layers.1.q_proj" in line
    assert line.endswith("; was r changed?\n")
    shown = line.count("q_proj")
    assert f"; and {300 - shown} more; " in line


_INSPECT = ["inspect", "config.json"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "args",
    [["--help"], *(pytest.param(args, marks=pytest.mark.slow) for args in ([*_INSPECT, "--json"], _INSPECT))],
    ids=["help", "json", "tables"],
)
def test_a_reader_that_is_gone_ends_a_command_as_other_programs(tmp_path, args, unbuffered):
    """As `| true`: stdout is a pipe that nobody reads."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2}')
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flashbone", *args]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": writer, "stderr": subprocess.PIPE}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, timeout=120, **pipes)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error(command, capfd):
    command(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert cli.main(["train"]) == 1
    assert "BrokenPipeError" in capfd.readouterr().err


def test_helper_processes_say_who_speaks(command, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    command(raising(ConfigError("no")))
    cli.main(["train"])
    assert capsys.readouterr().err == "[process 1] flashbone train: error: no\n"


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:25989: Connection reset by peer.",
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
def test_helper_processes_do_not_say_that_another_has_ended(words, command, capsys, monkeypatch):
    command(raising(RuntimeError(words)))
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train"]) == 1
        assert len(capsys.readouterr().err.splitlines()) == lines


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


def test_foreign_text_is_one_visible_line_of_limited_length():
    assert visible("a\x1b[2J\nb\u202ec\x9b") == "a\\x1b[2J\\nb\\u202ec\\x9b"
    assert visible("größe 層") == "größe 層"
    for text in ("x" * 10**6, "\x1b" * 1000, "\udc80" * 999):
        assert len(visible(text)) == 200
        assert visible(text).isprintable()
    assert visible("first" + "x" * 10**6 + "last").startswith("firstx")
    assert visible("first" + "x" * 10**6 + "last").endswith("xlast")


@pytest.mark.parametrize("separator", ["; ", ", ", " ", "\n", "\x1b[1m"])
def test_an_error_is_one_line_of_at_most_500_whatever_it_holds(separator):
    for size in (1, 30, 400, 3000):
        line = one_line(separator.join(["x" * size] * 50))
        assert len(line) <= 500
        assert line.isprintable()
