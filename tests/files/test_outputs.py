"""Lines of JSON that a kill cuts short, and folders that one run has for itself."""

import errno
import shutil
import subprocess
import sys

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.files import outputs
from flashbone.files.outputs import alone, read_json_lines
from flashbone.train.callbacks import MetricsLog

LINE = '{"step": 1, "of": "a\u2028b"}\n'
ROW = {"step": 1, "of": "a\u2028b"}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("after_kill", [False, True])
@pytest.mark.parametrize("end", ["\n", ""])
def test_whole_lines_are_read_by_everyone(file, after_kill, end):
    file.write_text(2 * LINE + '{"step": 2}' + end, encoding="utf-8")
    assert read_json_lines(file, after_kill) == [ROW, ROW, {"step": 2}]


def test_a_file_that_is_not_there_is_an_error_but_for_who_goes_on(file):
    assert read_json_lines(file, after_kill=True) == []
    with pytest.raises(FormatError, match=r"metrics\.jsonl: no such file") as caught:
        read_json_lines(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("half", ['{"step": 2, "lo', '{"text": "ä'])
def test_a_last_line_that_is_half_written_is_an_error_but_for_who_goes_on(file, half):
    file.write_bytes((LINE + half).encode()[: -1 if half.endswith("ä") else None])
    assert read_json_lines(file, after_kill=True) == [ROW]
    with pytest.raises(FormatError, match=r"metrics\.jsonl:2: not valid JSON: .*; remove the line"):
        read_json_lines(file)


@pytest.mark.parametrize("after_kill", [False, True])
@pytest.mark.parametrize(("line", "problem"), [("oops", "not valid JSON"), ("3", "wanted a JSON object, got a int")])
def test_a_broken_line_before_the_end_is_an_error_for_everyone(file, after_kill, line, problem):
    file.write_text(f"{LINE}{line}\n{LINE}", encoding="utf-8")
    with pytest.raises(FormatError, match=rf"metrics\.jsonl:2: {problem}"):
        read_json_lines(file, after_kill)


def test_a_resumed_training_leaves_out_the_line_that_a_kill_cut_short(file):
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(file, keep_to_step=2)
    log.rewrite()
    assert read_json_lines(file) == log.rows == [{"step": 1}, {"step": 2}]
    assert MetricsLog(file.with_name("absent"), keep_to_step=2).rows == []


def test_a_folder_is_free_again_when_the_block_ends(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        with alone(folder):
            assert not list(folder.iterdir())
            with pytest.raises(ConfigError, match="another run is writing to it; wait for it, or choose another"):
                alone(folder).__enter__()


HOLD = """
import sys, time
from pathlib import Path
from flashbone.files.outputs import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_free_again_when_its_process_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run"):
            alone(tmp_path).__enter__()
        process.kill()
    with alone(tmp_path):
        assert tmp_path.exists()


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_folder_that_a_failed_run_removes_meanwhile_is_locked_anew(tmp_path, monkeypatch, made_anew):
    folder, calls = tmp_path / "out", []
    flocked = outputs._flocked

    def flocked_and_lost(handle, path):
        calls.append(handle)
        if len(calls) == 1:
            shutil.move(path, tmp_path / "gone")
            if made_anew:
                path.mkdir()
        return flocked(handle, path)

    monkeypatch.setattr(outputs, "_flocked", flocked_and_lost)
    with alone(folder):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="another run"):
            alone(folder).__enter__()


def flock_without_locks(handle, how):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("on", ["platform", "file system"])
def test_where_there_are_no_locks_the_run_goes_on_with_a_notice(tmp_path, monkeypatch, caplog, on):
    if on == "platform":
        monkeypatch.setattr(outputs, "fcntl", None)
    else:
        monkeypatch.setattr(outputs.fcntl, "flock", flock_without_locks)
    with alone(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    assert [record.getMessage() for record in caplog.records] == [
        f"output {tmp_path / 'out'}: there are no locks here; see to it that no other run writes to it"
    ]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(ConfigError, match="a file is in the way; choose another output"):
            alone(path).__enter__()
    assert (tmp_path / "file").read_text() == "here"
