"""Outputs that appear whole or not at all, lines of JSON that a kill cuts short, and folders of one run.

Whole folders are also tested by what writes them (tests/merge)."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import outputs
from flashbone.files.outputs import alone, read_json_lines
from flashbone.train.metrics import MetricsLog
from helpers.adapter_folders import listing

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
            (folder / "result").touch()
            with pytest.raises(ConfigError, match=r"is writing to it \(process \d+\); wait for it, or choose another"):
                alone(folder).__enter__()
        assert listing(folder) == ["result"]


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with alone(tmp_path / "out"):
        pass
    assert listing(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from flashbone.files.outputs import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_free_again_when_its_process_is_killed(tmp_path):
    folder = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run"):
            alone(folder).__enter__()
        process.kill()
    with alone(folder):
        assert folder.exists()


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_folder_that_a_failed_run_removes_meanwhile_is_locked_anew(tmp_path, monkeypatch, made_anew):
    folder, calls = tmp_path / "out", []
    acquire = filelock.FileLock.acquire

    def acquired_and_lost(lock, *args, **kwargs):
        calls.append(lock)
        proxy = acquire(lock, *args, **kwargs)
        if len(calls) == 1:
            shutil.move(folder, tmp_path / "gone")
            if made_anew:
                folder.mkdir()
        return proxy

    monkeypatch.setattr(filelock.FileLock, "acquire", acquired_and_lost)
    with alone(folder):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="another run"):
            alone(folder).__enter__()


def test_where_there_are_no_locks_the_run_goes_on_with_a_notice(tmp_path, monkeypatch, caplog):
    def acquire(lock, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with alone(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    assert [record.getMessage() for record in caplog.records] == [
        f"output {tmp_path / 'out'}: this file system has no locks; make sure that no other run writes to it"
    ]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_an_error_without_a_notice_of_locks(tmp_path, monkeypatch, caplog, code):
    def acquire(lock, *args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match=os.strerror(code)):
        alone(tmp_path / "out").__enter__()
    assert not caplog.records


def test_a_place_that_takes_no_folders_is_refused(tmp_path, monkeypatch):
    def mkdir(folder, *args, **kwargs):  # as in /proc
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ConfigError, match="out: no folder can be made there; choose another output"):
        alone(tmp_path / "out").__enter__()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(ConfigError, match="a file is in the way; choose another output"):
            alone(path).__enter__()
    assert (tmp_path / "file").read_text() == "here"


def test_a_file_appears_at_the_end_and_leaves_nothing_beside_it(tmp_path):
    out = tmp_path / "new" / "adapter.pth"
    with outputs.whole_or_absent(out, is_file=True) as file:
        file.write_bytes(b"whole")
        assert not out.exists()
        assert file.name == out.name  # so that a reader by suffix can check it first
        assert outputs.leftovers(out) == [file.parent]
    assert listing(tmp_path) == ["new", "new/adapter.pth"]
    assert out.read_bytes() == b"whole"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_no_file_and_no_folder(tmp_path, error):
    def fail() -> None:
        with outputs.whole_or_absent(tmp_path / "new" / "adapter.pth", is_file=True) as file:
            file.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert listing(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tmp_path):
    out = tmp_path / "adapter.pth"
    with (
        pytest.raises(FlashboneError, match=r"adapter.pth: no disk space left, .* nothing was written"),
        outputs.whole_or_absent(out, is_file=True),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert listing(tmp_path) == []


def test_a_file_that_appears_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "adapter.pth"

    def write() -> None:
        with outputs.whole_or_absent(out, is_file=True) as file:
            file.write_bytes(b"ours")
            out.write_bytes(b"theirs")

    with pytest.raises(FlashboneError, match="another run made it meanwhile"):
        write()
    assert out.read_bytes() == b"theirs"
    assert listing(tmp_path) == ["adapter.pth"]


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_nothing_is_written_over(tmp_path, what):
    out = tmp_path / "adapter.pth"
    if what == "file":
        out.touch()
    elif what == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FlashboneError, match=r"adapter.pth: exists already; name a new one"):
        outputs.check(out, 1, tmp_path / "source", is_file=True)


def test_an_empty_folder_may_become_the_output_folder(tmp_path):
    (tmp_path / "out").mkdir()
    outputs.check(tmp_path / "out", 1, tmp_path / "source")
    with outputs.whole_or_absent(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert listing(tmp_path) == ["out", "out/x"]


def test_the_current_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(FlashboneError, match="out: is the current folder, which cannot be replaced"):
        outputs.check(tmp_path / "out", 1, None)


def test_a_file_system_without_room_for_anything_is_no_place_for_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    with pytest.raises(FlashboneError, match=r"is no place for files; name another one"):
        outputs.check(tmp_path / "out", 1, None)


@pytest.mark.parametrize("is_taken", [True, False])
def test_where_there_are_no_links_a_file_is_renamed_and_still_never_over_another(tmp_path, monkeypatch, is_taken):
    out = tmp_path / "adapter.pth"

    def no_link(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)

    def write() -> None:
        with outputs.whole_or_absent(out, is_file=True) as file:
            file.write_bytes(b"ours")
            if is_taken:
                out.write_bytes(b"theirs")

    if is_taken:
        with pytest.raises(FlashboneError, match="another run made it meanwhile"):
            write()
    else:
        write()
    assert out.read_bytes() == (b"theirs" if is_taken else b"ours")
    assert listing(tmp_path) == ["adapter.pth"]


@pytest.mark.parametrize("is_file", [True, False])
def test_all_of_an_output_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, is_file):
    out, synced = tmp_path / "out", []
    sync = outputs._sync
    monkeypatch.setattr(outputs, "_sync", lambda path: (synced.append((path.name, out.exists())), sync(path)))
    with outputs.whole_or_absent(out, is_file=is_file) as place:
        if is_file:
            place.write_text("a")
        else:
            (place / "inner").mkdir()
            (place / "inner/file").write_text("a")
    wanted = ["out"] if is_file else ["file", "inner", place.name]
    assert synced == [*((name, False) for name in wanted), (tmp_path.name, True)]


def test_a_file_system_that_cannot_sync_is_no_error_and_a_broken_disk_is(tmp_path, monkeypatch):
    for code in (errno.EINVAL, errno.EIO):

        def fsync(handle, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        expected = pytest.raises(OSError, match="error") if code == errno.EIO else contextlib.nullcontext()
        with expected, outputs.whole_or_absent(tmp_path / f"out{code}") as place:
            (place / "file").write_text("a")
    assert listing(tmp_path) == [f"out{errno.EINVAL}", f"out{errno.EINVAL}/file"]
