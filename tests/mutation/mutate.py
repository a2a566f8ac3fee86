"""Mutation testing of the rooms in `ROOMS`: one change of the source at a time, and whether a test fails then.

    PYTHONPATH=.venv/mutants python tests/mutation/mutate.py [NAME ...] [--sample N] [--again] [--budget S] [--table]

NAMEs are beginnings of module names, such as `ops/moves`. mutmut's operators make the mutants. Its runner does not fit
here: it leaves decorated functions and module level code alone, as most of ops and the tables of checkpoint are.

One process imports the hosts, collects the tests and forks for each mutant, in which the code of the live functions is
exchanged; nothing is written. A mutant outside of functions is written to a copy of the source instead, and forked from
before the collection. Each meets tests that ran its lines, until one fails or the budget is used up. Results go to
.cache/mutants/results.jsonl and are not run again, but for survivors with `--again`. The exit code is 1 if a survivor
is not in may_live.toml.
"""

import argparse
import collections
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import tomllib
from mutants import Mutant, of_module
from running import NOT_RUN, OPTIONS, Report, Runner, by_line, choose, forked

ROOT = Path(__file__).resolve().parents[2]
SOURCE, CACHE = ROOT / "src", ROOT / ".cache" / "mutants"
ROOMS = ["shards.py", "variants/*.py", "ops/*.py", "checkpoint/*.py"]
TESTS = [
    *("tests/ops", "tests/checkpoint", "tests/conversion/test_lowrank.py", "tests/conversion/test_real_lora.py"),
    *("tests/merge/test_merged_weight.py", "tests/merge/test_merge_refusals.py", "tests/tuner/test_layer.py"),
    *("tests/merge/test_merge_outputs.py", "tests/merge/test_merge_pth.py", "tests/conversion/test_converting.py"),
    *("tests/conversion/test_converting_rwkv.py", "tests/rwkv/test_rwkv_files.py", "tests/tuner/test_mixed_batch.py"),
    *("tests/tuner/test_orthogonal.py", "tests/tuner/test_switches.py", "tests/tuner/test_layer_merging.py"),
    "tests/tuner/test_mixed_batch_models.py",
]
FRESH = 300  # tests at most for a mutant outside of functions: each is collected anew
LIVE = ("survived", "not run")


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
    mutants = {key(mutant): mutant for file in modules(arguments.names) for mutant in of_module(file)}
    if arguments.table:
        return summary({name: done[name] for name in mutants if name in done})
    if arguments.sample is not None:
        mutants = drawn(mutants, arguments.sample, arguments.seed)
    if arguments.again:
        left = [mutant for name, mutant in mutants.items() if done.get(name) in LIVE and not may_live(name)]
    else:
        left = [mutant for name, mutant in mutants.items() if name not in done]
    print(f"{len(mutants)} mutants, {len(left)} to run", flush=True)

    def report(mutant: Mutant, status: str, by: str) -> None:
        module, function, change = key(mutant)
        with results.open("a") as file:
            file.write(json.dumps([module, function, change, status, by]) + "\n")
        if status in LIVE:
            print(f"{status}: {module}:{mutant.lines.start} {function}\n    {change}", flush=True)

    run(left, arguments.budget, arguments.inside, report)
    done = read(results)
    return summary({name: done[name] for name in mutants if name in done})


def modules(names: list[str]) -> list[Path]:
    package = SOURCE / "flashbone"
    found = [file for room in ROOMS for file in sorted(package.glob(room))]
    return [f for f in found if not names or any(str(f.relative_to(package)).startswith(name) for name in names)]


def key(mutant: Mutant) -> tuple[str, str, str]:
    return str(mutant.file.relative_to(SOURCE / "flashbone")), mutant.function, mutant.change


def read(results: Path) -> dict[tuple[str, str, str], str]:
    """Mutant -> what became of it last."""
    rows = map(json.loads, results.read_text().splitlines() if results.exists() else [])
    return {(module, function, change): status for module, function, change, status, _ in rows}


def drawn(mutants: dict, count: int, seed: int) -> dict:
    telling = {name: mutant for name, mutant in mutants.items() if ") and False" in mutant.change}
    others = sorted(set(mutants) - set(telling))
    names = random.Random(seed).sample(others, min(count, len(others)))
    return telling | {name: mutants[name] for name in names}


def run(mutants: list[Mutant], budget: float, inside_only: bool, report: Report) -> None:
    sys.path.insert(0, str(SOURCE))
    import_hosts()
    inside = [mutant for mutant in mutants if not mutant.is_outside]
    child = os.fork()
    if not child:
        runner = Runner(inside, budget, report, CACHE / "coverage.json", modules([]))
        os._exit(int(pytest.main([*OPTIONS, *TESTS], [runner])))
    os.waitpid(child, 0)
    if inside_only:
        return
    shutil.rmtree(CACHE / "src", ignore_errors=True)
    shutil.copytree(SOURCE, CACHE / "src", ignore=shutil.ignore_patterns("__pycache__"))
    sys.path[0] = os.environ["PYTHONPATH"] = str(CACHE / "src")
    known = json.loads((CACHE / "coverage.json").read_text())["tests"]
    who = by_line(known)
    for moment, mutant in enumerate((mutant for mutant in mutants if mutant.is_outside), 1_000_000_000):
        copy = CACHE / "src" / mutant.file.relative_to(SOURCE)
        copy.write_text(mutant.source)
        os.utime(copy, (moment, moment))  # no compiled code is of that time
        chosen = choose(known, who, mutant)
        report(
            mutant, *(forked(lambda chosen=chosen: run_fresh(chosen, budget), 30 + 3 * budget) if chosen else NOT_RUN)
        )
        copy.write_text(mutant.file.read_text())


def import_hosts() -> None:
    """What takes seconds to import; nothing of flashbone, and no peft, since flashbone does much when it is there."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import hypothesis
    import torch
    import transformers  # noqa: F401

    hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
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
    noted = FirstFailure(budget)
    code = pytest.main([*OPTIONS, "-x", *tests], [noted])
    return noted.failed or (f"exit code {int(code)}" if code else "")


def may_live(name: tuple[str, str, str]) -> bool:
    module, function, change = name
    allowed = tomllib.loads(Path(__file__).with_name("may_live.toml").read_text())
    return change in allowed.get(f"{module} {function}".strip(), {})


def summary(done: dict[tuple[str, str, str], str]) -> int:
    """Print a table of the modules, and the survivors that are not in may_live.toml."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for (module, _, _), status in done.items():
        counts[module][status] += 1
    kinds = ("killed", "timed out", *LIVE)
    print(f"| module | mutants | {' | '.join(kinds)} |\n|---|{'---|' * (len(kinds) + 1)}")
    for module, found in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"| {module} | {found.total()} | {' | '.join(str(found[kind]) for kind in kinds)} |")
    unexplained = [name for name, status in done.items() if status in LIVE and not may_live(name)]
    print(*(f"{module} {function}: {change}" for module, function, change in unexplained), sep="\n")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
