"""The benchmarks at tiny sizes: every command from its workers to its rows, the arithmetic, the page, the errors."""

import dataclasses
import math
import os
from collections import defaultdict

import pytest
import torch
from benchmarks.__main__ import main
from benchmarks.cases import FROZEN, Case, Setting
from benchmarks.commands.load import IMPORTS
from benchmarks.errors import BenchmarkError, UsageError
from benchmarks.methods import TRAINED
from benchmarks.rounds import Plan, Sample, interleave, rows_of
from benchmarks.rows import Row, paired_ratios, read, save, spread
from benchmarks.run import check_ops
from benchmarks.tables import PAGE, write
from benchmarks.tables.page import SECTIONS, filled
from benchmarks.tables.targets import met, outcomes
from benchmarks.workers import ROOT, Pool, Worker

# memory and train are first: they fork their workers, which must not have computed yet.
RUNS = {
    "memory": ["--part", "main", "--methods", "bone,miss,peft-bat", "--dtype", "bf16-autocast"],
    "train": ["--part", "answers"],
    "layer": ["--dtype", "fp32"],
    "step": ["--part", "main", "--dtype", "bf16-autocast"],
    "decode": [],
    "forward": [],
    "mixed": ["--methods", "bone,bat-col,orthogonal,lora", "--dtype", "bf16"],
    "load": [],
    "merge": [],
    "wkv": [],
}
KEPT = ["memory", "--alive", "--methods", "bone,bat-row", "--dtype", "bf16-autocast"]


@pytest.fixture(scope="module")
def pool():
    with Pool(threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def found(pool, tmp_path_factory):
    """The rows of a quick run of every benchmark, all into one file."""
    out = tmp_path_factory.mktemp("results") / "rows.jsonl"
    # Importing peft takes seconds, and the workers have shown already that it can be imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPORTS, "import-peft", "json")
        patch.setitem(IMPORTS, "import-both", "flashbone, json")
        for command in [*([name, *arguments] for name, arguments in RUNS.items()), KEPT]:
            assert main([*command, "--quick", "--threads", "1", "--out", str(out)], pool) == 0
    by_benchmark = defaultdict(list)
    for row in read(out):
        by_benchmark[row.benchmark].append(row)
    return by_benchmark


def a_row(**fields) -> Row:
    values = fields.pop("values", [2.0, 1.0, 4.0])
    about = {"commit": "abc", "date": "2026-01-01 00:00:00", "versions": {"flashbone": "1"}}
    about["device"] = "A CPU, 2 threads"
    what = {"benchmark": "step", "part": "targets", "method": "bone", "r": 64, "adapters": 1, "metric": "time_ms"}
    size = {"shape": {"model": "smollm2"}, "dtype": "float32"}
    return Row(**{**about, **what, **size, **spread(values), **fields})


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_rows_say_what_they_depend_on(found, name):
    assert found[name]
    for row in found[name]:
        assert row.commit
        assert row.date
        assert row.device.endswith(", 1 thread")
        assert {"python", "torch", "transformers", "peft"} <= row.versions.keys()
        assert row.n == len(row.per_round)
        assert row.q1 <= row.median <= row.q3
        assert row.versions["peft"] == "0.18.1" or not row.method.startswith("peft-")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer", "step", "decode", "forward", "mixed", "load", "merge"])
def test_every_time_has_its_ratio_and_the_floors_is_one(found, name):
    floor = {"load": ("lora", "import-peft"), "merge": ("lora", "copy")}.get(name, ("frozen",))
    times = [row for row in found[name] if row.metric.endswith("_ms")]
    ratios = [row for row in found[name] if row.metric.endswith("_ratio")]
    assert len(times) == len(ratios) == len(found[name]) // 2
    assert all(math.isfinite(value) and value > 0 for row in times + ratios for value in row.per_round)
    assert {row.method for row in ratios if row.per_round == [1.0] * row.n} == set(floor)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer", "step"])
def test_all_methods_are_measured_and_the_old_peft_has_a_floor_of_its_own(found, name):
    measured = {(row.method, row.versions["peft"] == "0.18.1") for row in found[name] if row.part in ("shapes", "main")}
    old = {"frozen", "peft-bone", "peft-bat"}
    assert measured == {(method, method.startswith("peft-")) for method in TRAINED} | {(method, True) for method in old}


@pytest.mark.slow
def test_growth_of_a_layer_is_measured_in_every_direction(found):
    by_part = defaultdict(set)
    for row in found["layer"]:
        if row.method == "bone":
            by_part[row.part].add((row.shape["tokens"], row.r, row.adapters))
    assert by_part["tokens"] == {(4, 8, 1), (8, 8, 1), (16, 8, 1)}
    assert by_part["r"] == {(8, 4, 1), (8, 8, 1), (8, 16, 1)}
    assert by_part["adapters"] == {(8, 8, 1), (8, 8, 4), (8, 8, 10)}


@pytest.mark.slow
def test_memory_is_above_the_floor_of_the_same_tokens_and_process(found):
    measured = [row for row in found["memory"] if row.part == "main"]
    above = {row.method: row for row in measured if row.metric == "above_floor_mib"}
    assert above.keys() == {"frozen", "bone", "miss", "peft-bat"}
    assert all(row.median > 0 for method, row in above.items() if method != "frozen")
    assert all(row.median > 100 for row in found["memory"] if row.metric == "peak_mib")


@pytest.mark.slow
def test_a_whole_run_is_timed_and_its_memory_is_above_that_of_loading_the_model(found):
    of_bone = {row.metric: row.median for row in found["train"] if row.method == "bone"}
    assert 0 < of_bone["steps_ms"] < of_bone["whole_ms"]
    assert 0 < of_bone["above_floor_mib"] < of_bone["peak_mib"]


@pytest.mark.slow
def test_the_time_mixing_is_measured_both_ways_with_what_backward_keeps(found):
    sizes = {(version, tokens) for version in (7, 6) for tokens in (8, 40)}
    for part in ("forward", "training"):
        rows = [row for row in found["wkv"] if row.part == part]
        for metric in ("time_ms", "time_ratio", *(["saved_mib"] if part == "training" else [])):
            for method in ("wkv-loop", "wkv-chunked"):
                of_method = [row for row in rows if (row.method, row.metric) == (method, metric)]
                assert {(row.shape["version"], row.shape["tokens"]) for row in of_method} == sizes
                assert all(value > 0 for row in of_method for value in row.per_round)
    # The loop keeps a state of 8 x 8 for each of 2 heads, whenever a token has changed it, and more.
    for row in found["wkv"]:
        if (row.method, row.metric) == ("wkv-loop", "saved_mib"):
            assert row.median > row.shape["tokens"] * 2 * 8 * 8 * 4 / 2**20


def test_rows_survive_the_file_and_a_later_run_replaces_its_own_kind(tmp_path):
    old, other = a_row(), a_row(part="tokens")
    save(tmp_path / "rows.jsonl", [old, other])
    assert read(tmp_path / "rows.jsonl") == [old, other]
    new = dataclasses.replace(old, method="lora", date="2026-02-02 00:00:00")
    save(tmp_path / "rows.jsonl", [new])
    assert read(tmp_path / "rows.jsonl") == [other, new]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_ratios_are_paired_by_round():
    # The second round ran on a machine of half the speed: unpaired medians would give 4.5 / 2 = 2.25.
    assert paired_ratios([3.0, 6.0, 4.5], [2.0, 4.0, 1.0]) == [1.5, 1.5, 4.5]
    frozen = Sample(FROZEN, "here", {"device": "cpu", "versions": {}}, {"time_ms": [2.0, 4.0, 1.0]})
    bone = Sample(Setting("bone"), "here", frozen.about, {"time_ms": [3.0, 6.0, 4.5]})
    elsewhere = Sample(FROZEN, "there", frozen.about, {"time_ms": [1.0, 1.0, 1.0]})
    common = {"benchmark": "step", "part": "main", "shape": {}, "dtype": "float32", "commit": "", "date": ""}
    made = {(r.method, r.metric): r for r in rows_of([elsewhere, frozen, bone], "frozen", common, "")}
    assert made["bone", "time_ratio"].per_round == [1.5, 1.5, 4.5]
    assert made["bone", "time_ratio"].median == 1.5
    assert made["frozen", "time_ratio"].per_round == [1.0, 1.0, 1.0]


def test_spread_gives_median_and_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "n": 5,
        "per_round": [4.0, 1.0, 3.0, 2.0, 5.0],
    }
    assert spread([7.0])["q1"] == 7.0


def test_a_round_does_each_once_in_a_new_order_and_warm_up_does_not_count():
    calls = []
    repetitions = [lambda i=i: calls.append(i) or {"time_ms": float(len(calls))} for i in range(4)]
    figures = interleave(repetitions, Plan(rounds=6, warmup=2), tick=lambda: None)
    turns = [calls[at : at + 4] for at in range(0, len(calls), 4)]
    assert len(turns) == 8
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert all(len(figure["time_ms"]) == 6 and min(figure["time_ms"]) > 8 for figure in figures)


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_parent_in_one_line(pool, found):
    (worker,) = pool.get("current")
    worker.ask("open", case=Case("layer", {"tokens": 2, "in": 8, "out": 8}).to_dict())
    with pytest.raises(BenchmarkError, match=r"^worker current, prepare miss: ValueError: .*in_features \(8\)$"):
        worker.ask("prepare", "miss", setting=vars(Setting("miss", r=1000)))
    assert worker.ask("device", device="cpu")["device"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_report_on_a_device_that_is_not_there_ends_in_one_line(pool, found, tmp_path, capsys):
    assert main(["report", "--device", "cuda", "--out", str(tmp_path)], pool) == 1
    assert "CUDA" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_worker_that_dies_is_named_and_nothing_is_left_of_it(monkeypatch):
    monkeypatch.setattr("benchmarks.workers._environment", lambda name, threads: {"PYTHONPATH": "/nowhere", "PATH": ""})
    worker = Worker("no-such-method", threads=1)
    os.kill(worker._process.pid, 9)
    with pytest.raises(BenchmarkError, match=r"^worker no-such-method, start: it ended with code -9; [^\n]*$"):
        worker.ask("device", device="cpu")
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)


@pytest.mark.slow
def test_a_quick_run_leaves_the_results_alone(pool, found, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path / "results")
    assert main(["decode", "--quick", "--threads", "1", "--methods", "bone"], pool) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--methods", "bone,bune"], "got bune, wanted some of frozen, bone"),
        (["layer", "--rounds", "0"], "got '0', wanted a whole number of at least 1"),
        (["memory", "--part", "shapes"], "invalid choice: 'shapes'"),
        (["decode", "--quick", "--methods", "dora"], "decode: none of the methods asked for is measured here"),
        (["train", "--quick", "--model", "smollm2"], "run `make .venv/.demo` and `python -m examples.demo.prepare`"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.commands.train.DEMO", tmp_path / "not-there")
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr().err
    assert code == 2
    assert message in printed
    assert printed.count("\n") == 1


def test_a_missing_peft_018_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.workers.OLD_PEFT", ROOT / ".venv" / "not-there")
    with Pool(1) as pool, pytest.raises(UsageError, match=r"not-there is missing: run `make \.venv/\.dev`"):
        pool.get("peft-0.18.1")


def test_nothing_is_measured_while_the_op_tests_fail(tmp_path, monkeypatch):
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    (tmp_path / "tests" / "ops" / "test_wrong.py").write_text("def test_wrong():\n    assert False\n")
    monkeypatch.setattr("benchmarks.run.ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    with pytest.raises(BenchmarkError, match=r"the op tests fail \(1 failed"):
        check_ops("tests/ops")


def test_targets_are_computed_from_paired_rounds():
    step = [a_row(values=[0.9, 1.9, 0.8]), a_row(method="miss", values=[1.0, 2.0, 1.0])]
    old = [a_row(method="miss", values=[9.0, 9.0, 9.0], versions={"peft": "0.18.1"}, date="2027-01-01 00:00:00")]
    (found,) = outcomes(step + old)
    assert (found.target.claim, found.median, found.met) == ("step: bone / MiSS", 0.9, True)
    assert found.quartiles == pytest.approx((0.85, 0.925))
    assert met(step + old) == "**1 of 1 targets were met.**"
    worse = [a_row(values=[1.0, 2.0, 1.0]), step[1]]
    assert met(worse) == "**0 of 1 targets were met.**"


@pytest.mark.slow
def test_the_page_shows_what_the_rows_give_and_check_sees_a_difference(found, tmp_path, capsys):
    for name, of_benchmark in found.items():
        save(tmp_path / "results" / f"{name}.jsonl", of_benchmark)
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = {"results": tmp_path / "results", "pages": {copy: SECTIONS}, "images": tmp_path / "images"}
    assert write(check=False, **arguments) == 0
    assert write(check=True, **arguments) == 0
    text = copy.read_text(encoding="utf-8")
    assert "| PEFT 0.18.1 Bone bat |" in text
    assert "- load an adapter: flashbone bone " in text
    assert "| flashbone bat-row | 1 | 1 |" in text  # kept and needed
    assert "(images/step.svg)" in text
    assert (tmp_path / "images" / "step.svg").stat().st_size > 1000
    copy.write_text(text.replace("| PEFT MiSS |", "| PEFT MISS |"), encoding="utf-8")
    assert write(check=True, **arguments) == 1
    assert "run python -m benchmarks tables" in capsys.readouterr().err


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(BenchmarkError, match=r"no place for its part 'methods'"):
        filled("nothing", [], SECTIONS)


def test_the_committed_page_is_what_the_committed_rows_give():
    assert main(["tables", "--check"]) == 0
