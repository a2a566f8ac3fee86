"""Output files that appear whole or not at all; folders are tested by what writes them (tests/merge)."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from flashbone.errors import FlashboneError
from flashbone.files import staging
from helpers.adapter_folders import listing


def test_a_file_appears_at_the_end_and_leaves_nothing_beside_it(tmp_path):
    out = tmp_path / "new" / "adapter.pth"
    with staging.whole_or_absent(out, is_file=True) as file:
        file.write_bytes(b"whole")
        assert not out.exists()
    assert listing(tmp_path) == ["new", "new/adapter.pth"]
    assert out.read_bytes() == b"whole"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_no_file_and_no_folder(tmp_path, error):
    def fail() -> None:
        with staging.whole_or_absent(tmp_path / "new" / "adapter.pth", is_file=True) as file:
            file.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert listing(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tmp_path):
    out = tmp_path / "adapter.pth"
    with (
        pytest.raises(FlashboneError, match=r"adapter.pth: no disk space left, .* nothing was written"),
        staging.whole_or_absent(out, is_file=True),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert listing(tmp_path) == []


def test_a_file_that_appears_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "adapter.pth"

    def write() -> None:
        with staging.whole_or_absent(out, is_file=True) as file:
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
        staging.check(out, 1, tmp_path / "source", is_file=True)


def test_an_empty_folder_may_become_the_output_folder(tmp_path):
    (tmp_path / "out").mkdir()
    staging.check(tmp_path / "out", 1, tmp_path / "source")
    with staging.whole_or_absent(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert listing(tmp_path) == ["out", "out/x"]


def test_the_current_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(FlashboneError, match="out: is the current folder, which cannot be replaced"):
        staging.check(tmp_path / "out", 1, None)


def test_a_file_system_without_room_for_anything_is_no_place_for_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    with pytest.raises(FlashboneError, match=r"is no place for files; name another one"):
        staging.check(tmp_path / "out", 1, None)


@pytest.mark.parametrize("is_taken", [True, False])
def test_where_there_are_no_links_a_file_is_renamed_and_still_never_over_another(tmp_path, monkeypatch, is_taken):
    out = tmp_path / "adapter.pth"

    def no_link(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)

    def write() -> None:
        with staging.whole_or_absent(out, is_file=True) as file:
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
