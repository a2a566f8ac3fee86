"""Interrupted at any point, the output is absent or whole; and no more than one tensor is ever in memory."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import weakref
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from flashbone.errors import FlashboneError
from flashbone.files import outputs, tensors
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import listing, write_adapter
from helpers.blocks import random_block


@pytest.fixture
def place(tmp_path):
    """A base by hand, adapters, a merged model, and all of it as `.pth` files."""
    base = tmp_path / "base"
    base.mkdir()
    state = {f"blocks.{n}.att.q.weight": torch.randn(8, 8) for n in range(3)} | {"emb.weight": torch.randn(3, 8)}
    save_file(state, base / "model.safetensors")
    torch.save(state, tmp_path / "base.pth")
    (base / "config.json").write_text('{"dtype": "float32"}')
    for name, variant, block in (("adapter", "bone", (4, 8)), ("second", "bat-row", (2, 4, 4))):
        blocks = {f"blocks.{n}.att.q": torch.randn(block) / 4 for n in (0, 2)}
        write_adapter(tmp_path / name, variant, blocks)
    return tmp_path


def _merge(place, out, progress, base="base", adapters=("adapter",), **fields):
    return merge_checkpoint(place / base, [place / name for name in adapters], place / out, progress, **fields)


# What is interrupted, and the least number of pieces that it writes.
RUNS = {
    "merge": (_merge, 7),
    "two adapters": (partial(_merge, adapters=("adapter", "second"), weights=[0.5, 2]), 7),
    "other dtype and shards": (partial(_merge, dtype="bf16", shard_size="200B"), 10),
    "pth": (partial(_merge, base="base.pth", dtype="bf16"), 7),
    "check": (partial(_merge, check=lambda made: None), 7),
}


def _name(run: str, out: str) -> str:
    return f"{out}.pth" if run == "pth" else out


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("out", ["out", "new/deep/out"])
@pytest.mark.parametrize("run", RUNS)
def test_an_exception_at_any_write_leaves_nothing_behind(place, run, error, out):
    make, least = RUNS[run]
    calls = []
    make(place, _name(run, "trial"), lambda *a: calls.append(a))
    before = listing(place)
    for stop in range(1, len(calls) + 1):
        seen = iter(range(1, len(calls) + 1))

        def fail(done: int, total: int, seen=seen, stop=stop) -> None:
            if next(seen) == stop:
                raise error

        with pytest.raises(error):
            make(place, _name(run, out), fail)
        assert listing(place) == before
    assert len(calls) >= least


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_is_one_clear_error(place, run, number):
    make, _ = RUNS[run]
    make(place, _name(run, "trial"), None)
    before = listing(place)

    def fill(done: int, total: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(
        FlashboneError, match=r"out(\.pth)?: no disk space left, free some or write elsewhere; nothing was written"
    ):
        make(place, _name(run, "out"), fill)
    assert listing(place) == before


def test_an_output_that_appears_meanwhile_is_not_touched(place):
    def appear(done: int, total: int) -> None:
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / "other").touch()

    with pytest.raises(FlashboneError, match="another run made it meanwhile"):
        merge_checkpoint(place / "base", place / "adapter", place / "out", appear)
    assert listing(place / "out") == ["other"]
    assert outputs.leftovers(place / "out") == []


@pytest.mark.slow
def test_a_killed_run_leaves_no_output(place):
    """SIGKILL in the middle: what is left is hidden, is found as a leftover, and does not stop the next run."""
    outs = ("out", "out.pth")
    code = f"""
        import multiprocessing, os, signal
        from flashbone.merge import merge_checkpoint
        place = {str(place)!r}
        def run(base, out, **fields):
            seen = []
            def kill(done, total):
                seen.append(done)
                if len(seen) == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
            merge_checkpoint(place + base, place + "/adapter", place + out, kill, **fields)
        for base, out, fields in (("/base", "/out", dict(shard_size="200B")), ("/base.pth", "/out.pth", {{}})):
            child = os.fork()
            if not child:
                run(base, out, **fields)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for out in outs:
        assert not (place / out).exists()
        assert len(outputs.leftovers(place / out)) == (2 if out == "out" else 1)  # .out.pth.x is one of .out.*, too
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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_grows_by_two_tensors_at_most_however_large_the_model(tmp_path):
    """Tensors of 48 MiB: the peak is one of them when merged, one and a half with another dtype, and some 25 MiB."""
    for name, size, layers in (("large", (4096, 3072), 2), ("small", (64, 96), 1)):
        (tmp_path / name / "base").mkdir(parents=True)
        state = {f"layers.{n}.q.weight": torch.randn(size) for n in range(layers)}
        save_file(state, tmp_path / name / "base" / "model.safetensors")
        blocks = {f"layers.{n}.q": random_block("bat-row", *size, 32, std=1e-3).float() for n in range(0, layers, 2)}
        write_adapter(tmp_path / name / "adapter", "bat-row", blocks, r=32)
    code = """
        import json, os
        from flashbone.merge import merge_checkpoint
        runs = [
            lambda: merge_checkpoint("base", "adapter", "merged"),
            lambda: merge_checkpoint("base", "adapter", "short", dtype="bf16", shard_size="1GB"),
        ]
        def peak_mib():
            status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
            return int(status["VmHWM"].split()[0]) / 1024
        os.chdir("small")
        for run in runs:
            run()
        os.chdir("../large")
        before, peaks = peak_mib(), []
        for run in runs:
            run()
            peaks.append(peak_mib() - before)
        print(json.dumps(peaks))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads have buffers of their own
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    merged, short = json.loads(run.stdout)
    assert 40 < merged < 48 + 36
    assert short < 2 * 48 + 16
