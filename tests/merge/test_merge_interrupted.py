"""Interrupted at any point, the output is absent or whole; and no more than one tensor is ever in memory."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from safetensors.torch import save_file

from flashbone.checkpoint import staging, tensors
from flashbone.errors import FlashboneError
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import listing, write_adapter


@pytest.fixture
def place(tmp_path):
    """A base of two shards by hand, and an adapter."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"layers.{n}.q.weight": torch.randn(8, 8) for n in range(3)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    write_adapter(tmp_path / "adapter", "bone", {"layers.0.q": torch.randn(4, 8), "layers.2.q": torch.randn(4, 8)})
    return tmp_path


def _pieces(place) -> int:
    calls = []
    merge_checkpoint(place / "base", place / "adapter", place / "trial", lambda *a: calls.append(a))
    return len(calls)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("out", ["out", "new/deep/out"])
def test_an_exception_at_any_write_leaves_nothing_behind(place, error, out):
    pieces = _pieces(place)
    before = listing(place)
    for stop in range(1, pieces + 1):
        seen = iter(range(1, pieces + 1))

        def fail(done: int, total: int, seen=seen, stop=stop) -> None:
            if next(seen) == stop:
                raise error

        with pytest.raises(error):
            merge_checkpoint(place / "base", place / "adapter", place / out, fail)
        assert listing(place) == before
    assert pieces >= 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_is_one_clear_error(place, number):
    before = listing(place)

    def fill(done: int, total: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(
        FlashboneError, match="out: no disk space left, free some or write elsewhere; nothing was written"
    ):
        merge_checkpoint(place / "base", place / "adapter", place / "out", fill)
    assert listing(place) == before


def test_an_output_that_appears_meanwhile_is_not_touched(place):
    def appear(done: int, total: int) -> None:
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / "other").touch()

    with pytest.raises(FlashboneError, match="another run made it meanwhile"):
        merge_checkpoint(place / "base", place / "adapter", place / "out", appear)
    assert listing(place / "out") == ["other"]
    assert staging.leftovers(place / "out") == []


def test_a_killed_run_leaves_no_output(place):
    """SIGKILL in the middle: what is left is hidden, is found as a leftover, and does not stop the next run."""
    code = f"""
        import os, signal
        from flashbone.merge import merge_checkpoint
        place = {str(place)!r}
        seen = []
        def kill(done, total):
            seen.append(done)
            if len(seen) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        merge_checkpoint(place + "/base", place + "/adapter", place + "/out", kill)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert run.returncode == -signal.SIGKILL
    assert not (place / "out").exists()
    assert len(staging.leftovers(place / "out")) == 1
    assert merge_checkpoint(place / "base", place / "adapter", place / "out").merged == 2


def test_one_tensor_is_alive_at_a_time(place, monkeypatch):
    alive, read = [], tensors.read

    def watched(file, entry):
        assert [r() for r in alive] == [None] * len(alive)
        tensor = read(file, entry)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(tensors, "read", watched)
    merge_checkpoint(place / "base", place / "adapter", place / "out")
    assert len(alive) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_stays_at_a_few_tensors_however_large_the_model(tmp_path):
    """Two shards of 96 MiB, tensors of 8 MiB: the peak grows by a few tensors (7 measured), and by no whole shard."""
    base = tmp_path / "base"
    base.mkdir()
    weight_map = {}
    for shard in range(2):
        name = f"model-{shard}.safetensors"
        state = {f"layers.{shard}.{n}.q.weight": torch.randn(2048, 1024) for n in range(12)}
        save_file(state, base / name)
        weight_map |= dict.fromkeys(state, name)
    (base / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    blocks = {name.removesuffix(".weight"): torch.randn(32, 2048) for name in list(weight_map)[::2]}
    write_adapter(tmp_path / "adapter", "bone", blocks, r=32)
    small = tmp_path / "small"
    (small / "base").mkdir(parents=True)
    save_file({"layers.0.q.weight": torch.randn(8, 8)}, small / "base" / "model.safetensors")
    write_adapter(small / "adapter", "bone", {"layers.0.q": torch.randn(4, 8)})
    code = f"""
        from flashbone.checkpoint import peft
        from flashbone.merge import merge_checkpoint
        def merge(place):
            merge_checkpoint(place + "/base", place + "/adapter", place + "/out")
            status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
            return int(status["VmHWM"].split()[0]) // 1024
        peft.read({str(tmp_path / "adapter")!r})
        before = merge({str(small)!r})
        print(merge({str(tmp_path)!r}) - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=240, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grown_mib = int(run.stdout)
    assert 8 <= grown_mib < 10 * 8
