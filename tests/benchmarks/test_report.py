"""The report that people with a GPU are asked for: whole on a CPU at tiny sizes, and parts that fail."""

import json
import threading

import pytest
from benchmarks.__main__ import main
from benchmarks.report import PARTS, Job, Part, attempted
from benchmarks.report.page import written
from benchmarks.rows import Row, read, spread
from benchmarks.workers import Pool

ENVIRONMENT = {"report": {"device": "cpu"}}


@pytest.mark.slow
def test_the_quick_report_is_a_folder_with_every_part(tmp_path, capsys):
    assert main(["report", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for name in PARTS:
        assert f"<td class=''>{name}</td>" in page
        assert name in printed
    assert "failed" not in printed
    assert "not run: the kernels need a GPU" in page
    assert "http" not in page
    assert "src=" not in page
    rows = read(tmp_path / "rows.jsonl")
    assert {row.benchmark for row in rows} >= {"memory", "correctness", "step", "layer", "decode", "roofline", "mixed"}
    errors = [row for row in rows if row.benchmark == "correctness"]
    assert {(row.method, row.shape["how"], row.shape["what"]) for row in errors} == {
        (variant, how, what)
        for variant in ("bone", "mini", "bat-row", "bat-col", "orthogonal")
        for how in ("eager", "compiled")
        for what in ("output", "gradient of x", "gradient of the block")
    }
    assert all(row.median <= row.shape["limit"] for row in errors)
    assert {row.metric for row in rows if row.benchmark == "roofline"} == {"predicted_ms", "measured_ms"}
    assert json.loads((tmp_path / "environment.json").read_text())["report"]["sizes"].startswith("tiny")


def job(tmp_path, pool) -> Job:
    return Job(pool, "cpu", True, tmp_path)


def test_a_part_that_fails_is_named_with_its_error(tmp_path):
    def fail(job, part):
        raise ZeroDivisionError("by\nzero <b>")

    with Pool(1) as pool:
        part = attempted("wrong", fail, job(tmp_path, pool), 60)
    assert part.failures == ["ZeroDivisionError: by zero <b>"]
    assert part.verdict == "failed: 1 errors, 0 results beyond their limits"
    assert "by zero &lt;b&gt;" in written([part], ENVIRONMENT)


def test_a_part_that_takes_too_long_is_ended_and_one_without_time_is_not_begun(tmp_path):
    killed = threading.Event()

    class Waiting(Pool):
        def kill(self):
            killed.set()

    def wait(job, part):
        assert killed.wait(30)
        raise RuntimeError("the worker is gone")

    with Waiting(1) as pool:
        assert attempted("slow", wait, job(tmp_path, pool), 0.05).failures == ["its time was over"]
        assert attempted("late", wait, job(tmp_path, pool), 0).verdict == "not run: no time was left"


def test_an_error_beyond_its_limit_is_a_failure():
    shape = {"how": "eager", "what": "output", "limit": 1.5e-2}
    about = {"device": "d", "versions": {}, "commit": "", "date": ""}
    what = {"benchmark": "correctness", "part": "report", "method": "bone", "r": 0, "adapters": 1, "dtype": "bfloat16"}

    def part(error: float) -> Part:
        return Part("correctness", rows=[Row(**what, **about, shape=shape, metric="relative_error", **spread([error]))])

    assert part(1e-3).verdict == "done"
    for wrong in (part(1.0), part(float("nan"))):
        assert wrong.verdict == "failed: 0 errors, 1 results beyond their limits"
        assert "class='number bad'" in written([wrong], ENVIRONMENT)
