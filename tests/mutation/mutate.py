"""Mutation testing of the rooms in `ROOMS`: one change of the source at a time, and whether a test fails then.

    PYTHONPATH=.venv/mutants python tests/mutation/mutate.py [NAME ...] [--sample N] [--again] [--budget S] [--table]

NAMEs are beginnings of module names, such as `ops/moves`. mutmut's operators make the mutants. Its runner does not fit
here: it leaves decorated functions and module level code alone, as most of ops and the tables of files are.

One process imports the hosts, collects the tests and forks for each mutant, in which the code of the live functions is
exchanged; nothing is written. A mutant outside of functions is written to a copy of the source instead, and forked from
before the collection. Each meets tests that ran its lines, until one fails or the budget is used up. Results go to
.cache/mutants/results.jsonl and are not run again, but for survivors with `--again`: remove that file when tests or
sources have changed. A kill counts only where the same tests, in the same order, pass on the source as it is, which is
tried first for each module. The exit code is 1 if a survivor is not in may_live.toml, or a mutant was not run.
"""

import argparse
import collections
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import tomllib
from mutants import Mutant, of_module, unchanged
from running import NOT_RUN, OPTIONS, STOPPED, Known, Report, Runner, by_line, check_unchanged, choose, forked

ROOT = Path(__file__).resolve().parents[2]
SOURCE, CACHE = ROOT / "src", ROOT / ".cache" / "mutants"
ROOMS = ["shards.py", "variants/*.py", "ops/*.py", "files/*.py"]
TESTS = [
    *("tests/ops", "tests/files", "tests/conversion/test_lowrank.py", "tests/conversion/test_real_lora.py"),
    *("tests/merge/test_merged_weight.py", "tests/merge/test_merge_refusals.py", "tests/tuner/test_layer.py"),
    *("tests/merge/test_merge_outputs.py", "tests/merge/test_merge_pth.py", "tests/conversion/test_converting.py"),
    *("tests/conversion/test_converting_rwkv.py", "tests/rwkv/test_rwkv_files.py", "tests/tuner/test_mixed_batch.py"),
    *("tests/tuner/test_orthogonal.py", "tests/tuner/test_switches.py", "tests/tuner/test_layer_merging.py"),
    "tests/tuner/test_mixed_batch_models.py",
]
LIVE = ("survived", "not run")
UNTRIED = "untried"
Name = tuple[str, str, str]  # module, function, change


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--sample", type=int, help="conditions forced to be false, and this many others, drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="run survivors again, and nothing else")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of tests for a mutant")
    parser.add_argument("--inside", action="store_true", help="of functions only")
    parser.add_argument("--table", action="store_true", help="run nothing, count what has run")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    results = CACHE / "results.jsonl"
    done = read(results)
    made = [mutant for file in modules(arguments.names) for mutant in of_module(file)]
    mutants = {key(mutant): mutant for mutant in made if not (arguments.inside and mutant.is_outside)}
    assert len({*map(key, made)}) == len(made), "two mutants of one key"
    if arguments.sample is not None:
        mutants = drawn(mutants, arguments.sample, arguments.seed)
    if not mutants:
        parser.error(f"no mutant is asked for by {' '.join(sys.argv[1:])}; names are such as ops/moves")
    if arguments.table:
        return summary(mutants, done)
    if arguments.again:
        left = [mutant for name, mutant in mutants.items() if done.get(name) in LIVE and not may_live(name)]
    else:
        left = [mutant for name, mutant in mutants.items() if done.get(name, STOPPED) == STOPPED]
    print(f"{len(mutants)} mutants, {len(left)} to run", flush=True)

    def report(mutant: Mutant, status: str, by: str) -> None:
        module, function, change = key(mutant)
        with results.open("a") as file:
            file.write(json.dumps([module, function, change, status, by]) + "\n")
        if status in (*LIVE, STOPPED):
            print(f"{status}: {module}:{mutant.lines.start} {function}\n    {change}", flush=True)

    if left:
        run(left, arguments.budget, report)
    return summary(mutants, read(results))


def modules(names: list[str]) -> list[Path]:
    package = SOURCE / "flashbone"
    found = [file for room in ROOMS for file in sorted(package.glob(room))]
    return [f for f in found if not names or any(str(f.relative_to(package)).startswith(name) for name in names)]


def key(mutant: Mutant) -> Name:
    return str(mutant.file.relative_to(SOURCE / "flashbone")), mutant.function, mutant.change


def read(results: Path) -> dict[Name, str]:
    """Mutant -> what became of it last."""
    rows = map(json.loads, results.read_text().splitlines() if results.exists() else [])
    return {(module, function, change): status for module, function, change, status, _ in rows}


def drawn(mutants: dict, count: int, seed: int) -> dict:
    telling = {name: mutant for name, mutant in mutants.items() if ") and False" in mutant.change}
    others = sorted(set(mutants) - set(telling))
    names = random.Random(seed).sample(others, min(count, len(others)))
    return telling | {name: mutants[name] for name in names}


def run(mutants: list[Mutant], budget: float, report: Report) -> None:
    sys.path.insert(0, str(SOURCE))
    import_hosts()
    outside = [mutant for mutant in mutants if mutant.is_outside]
    child = os.fork()
    if not child:
        inside = [mutant for mutant in mutants if not mutant.is_outside]
        runner = Runner(inside, budget, report, CACHE / "coverage.json", modules([]))
        os._exit(int(pytest.main([*OPTIONS, *TESTS], [runner])))
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"the process that runs the mutants ended with {os.waitstatus_to_exitcode(status)}, see above")
    if outside:
        run_outside(outside, budget, report)


def run_outside(mutants: list[Mutant], budget: float, report: Report) -> None:
    """Those of module level: in a copy of the source, with the tests collected anew for each."""
    shutil.rmtree(CACHE / "src", ignore_errors=True)
    shutil.copytree(SOURCE, CACHE / "src", ignore=shutil.ignore_patterns("__pycache__"))
    sys.path[0] = os.environ["PYTHONPATH"] = str(CACHE / "src")
    known: Known = json.loads((CACHE / "coverage.json").read_text())["tests"]
    who = by_line(known)
    moments = itertools.count(1_000_000_000)
    passed: set[tuple[str, ...]] = set()

    def met(mutant: Mutant, chosen: list[str]) -> tuple[str, str]:
        copy, moment = CACHE / "src" / mutant.file.relative_to(SOURCE), next(moments)
        copy.write_text(mutant.source)
        os.utime(copy, (moment, moment))  # no compiled code is of that time
        try:
            return forked(lambda: run_fresh(chosen, budget), 30 + 3 * budget)
        finally:
            copy.write_text(mutant.file.read_text())

    for mutant in mutants:
        chosen = choose(known, who, mutant)
        if chosen and tuple(chosen) not in passed:
            check_unchanged(mutant.file, *met(unchanged(mutant.file), chosen))
            passed.add(tuple(chosen))
        report(mutant, *(met(mutant, chosen) if chosen else NOT_RUN))


def import_hosts() -> None:
    """What takes seconds to import; nothing of flashbone, and no peft, since flashbone does much when it is there."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import hypothesis
    import torch
    import transformers  # noqa: F401

    hypothesis.settings.register_profile("mutants", database=None, derandomize=True, deadline=None)
    hypothesis.settings.load_profile("mutants")
    torch.set_num_threads(1)


class FirstFailure:
    """A pytest plugin that notes the first test that fails, and stops when the budget is used up."""

    def __init__(self, budget: float) -> None:
        self.failed, self.end, self.budget = "", math.inf, budget

    def pytest_runtestloop(self) -> None:
        self.end = time.perf_counter() + self.budget

    def pytest_runtest_logfinish(self) -> None:
        if time.perf_counter() > self.end:
            pytest.exit("the budget is used up", 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


def run_fresh(tests: list[str], budget: float) -> str:
    """The first test that fails, or the collection: the unchanged source passes with the same tests before."""
    noted = FirstFailure(budget)
    code = pytest.main([*OPTIONS, "-x", *tests], [noted])
    if code in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        return f"the collection: pytest's exit code {int(code)}"
    return f"{STOPPED}: pytest's exit code {int(code)}" if code not in (0, 1) else noted.failed


def may_live(name: Name) -> bool:
    module, function, change = name
    allowed = tomllib.loads(Path(__file__).with_name("may_live.toml").read_text())
    return change in allowed.get(f"{module} {function}".strip(), {})


def summary(mutants: Iterable[Name], done: dict[Name, str]) -> int:
    """Print a table of the modules, and what is wrong: survivors not in may_live.toml, mutants without a result."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    found = {name: done.get(name, UNTRIED) for name in mutants}
    for (module, _, _), status in found.items():
        counts[module][status] += 1
    kinds = ("killed", "timed out", *LIVE, STOPPED, UNTRIED)
    print(f"| module | mutants | {' | '.join(kinds)} |\n|---|{'---|' * (len(kinds) + 1)}")
    for module, count in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"| {module} | {count.total()} | {' | '.join(str(count[kind]) for kind in kinds)} |")
    unexplained = [name for name, status in found.items() if status in LIVE and not may_live(name)]
    stopped = [name for name, status in found.items() if status == STOPPED]
    print(*(f"{found[name]}: {name[0]} {name[1]}: {name[2]}" for name in unexplained + stopped), sep="\n")
    untried = [*found.values()].count(UNTRIED)
    if untried:
        print(f"{untried} of {len(found)} mutants were not run")
    return bool(unexplained or stopped or untried)


if __name__ == "__main__":
    sys.exit(main())
