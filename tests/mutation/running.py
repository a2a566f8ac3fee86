"""Run tests on mutants, each in a fork of a process that has imported everything and collected the tests."""

import collections
import gc
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from mutants import Mutant, unchanged

OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=no", "--timeout=20"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-o", "tmp_path_retention_policy=none"]
NOT_RUN = "not run", ""  # no test runs it
STOPPED = "stopped"  # ended from outside, or without a test: it says nothing about the mutant
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}  # which no test survives
MAX_FILE = 1 << 30  # bytes; a mutant may write without end
Report = Callable[[Mutant, str, str], None]
Known = dict[str, tuple[float, list[tuple[str, int]]]]  # test -> its seconds, and the lines (file, number) that it runs


class Runner:
    """A pytest plugin that, in the place of the tests, runs each mutant with those that ran its lines."""

    def __init__(self, mutants: list[Mutant], budget: float, report: Report, kept: Path, sources: list[Path]) -> None:
        self.mutants, self.budget, self.report, self.kept, self.sources = mutants, budget, report, kept, sources
        self.failed = ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        try:
            self.run_mutants(session)
        except SystemExit as error:  # pytest would add a traceback
            pytest.exit(str(error), 1)
        return True

    def run_mutants(self, session: pytest.Session) -> None:
        if session.testsfailed:
            sys.exit(f"{session.testsfailed} files of tests cannot be collected, so that their tests would be missed")
        items = {item.nodeid: item for item in session.items}
        known = self.coverage(items)
        who = by_line(known)
        files = {str(source) for source in self.sources}
        functions = [f for f in gc.get_objects() if type(f) is types.FunctionType and f.__code__.co_filename in files]
        gc.freeze()  # or collecting would copy all memory in each child
        passed: set[tuple[str, ...]] = set()  # lists of tests, and their beginnings, that pass on the source as it is

        def met(mutant: Mutant, names: list[str], budget: float = self.budget) -> tuple[str, str]:
            def work() -> str:
                exchange(mutant, functions)
                return self.run([items[name] for name in names], budget)

            return forked(work, 3 * self.budget)

        def control(file: Path, names: list[str]) -> None:
            if tuple(names) not in passed:
                check_unchanged(file, *met(unchanged(file), names, math.inf))
                passed.update(tuple(names[:end]) for end in range(1, len(names) + 1))

        for file in dict.fromkeys(mutant.file for mutant in self.mutants):
            if names := choose(known, who, unchanged(file)):
                check_unchanged(file, *met(unchanged(file), names))
        for mutant in self.mutants:
            chosen = choose(known, who, mutant)
            status, by = met(mutant, chosen) if chosen else NOT_RUN
            if status == "killed" and by in chosen:
                control(mutant.file, chosen[: chosen.index(by) + 1])
            self.report(mutant, status, by)

    def run(self, items: list[pytest.Item], budget: float = math.inf) -> str:
        """In a child: the first test that fails."""
        self.failed, start = "", time.perf_counter()
        for item, after in zip(items, [*items[1:], None], strict=True):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
            if self.failed or time.perf_counter() - start > budget:
                break
        return self.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def coverage(self, items: dict[str, pytest.Item]) -> Known:
        """What each test runs, of the sources; kept as long as its file and all sources are the same."""
        ages = {str(f): f.stat().st_mtime for f in [*self.sources, *{item.path for item in items.values()}]}
        kept = json.loads(self.kept.read_text()) if self.kept.exists() else {"ages": {}, "tests": {}}
        if any(kept["ages"].get(str(source)) != ages[str(source)] for source in self.sources):
            kept["tests"] = {}
        current = {name for name, item in items.items() if kept["ages"].get(str(item.path)) == ages[str(item.path)]}
        tests = {name: found for name, found in kept["tests"].items() if name in current}
        new = [item for name, item in items.items() if name not in tests and name not in (current & {*kept["tests"]})]

        def work() -> str:
            tests.update(self.traced(new))
            self.kept.write_text(json.dumps({"ages": ages, "tests": tests}))
            return ""

        if forked(work, 3600) != ("survived", ""):
            sys.exit("the run that notes which test runs which lines did not end")
        return json.loads(self.kept.read_text())["tests"]

    def traced(self, items: Iterable[pytest.Item]) -> Known:
        seen: set[tuple[str, int]] = set()
        files, tests = {str(source) for source in self.sources}, {}

        def line(frame: types.FrameType, _event: str, _arg: object):
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        for item in items:
            seen.clear()
            start = time.perf_counter()
            sys.settrace(lambda frame, _event, _arg: line if frame.f_code.co_filename in files else None)
            failed = self.run([item])
            sys.settrace(None)
            if not failed:
                tests[item.nodeid] = time.perf_counter() - start, sorted(seen)
        return tests


def exchange(mutant: Mutant, functions: list[types.FunctionType]) -> None:
    """Give the functions of a module, wherever they are held, their code in the mutant."""
    codes: dict[str, list[types.CodeType]] = collections.defaultdict(list)
    for code in mutant.codes():
        codes[code.co_qualname].append(code)
    for function in functions:
        old = function.__code__
        if old.co_filename == str(mutant.file):  # a decorator moves the first line of what stands under it
            function.__code__ = min(codes[old.co_qualname], key=lambda c: abs(c.co_firstlineno - old.co_firstlineno))


def by_line(known: Known) -> dict[str, dict[int, set[str]]]:
    """File -> line -> tests that run it; line 0: any."""
    who: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for name, (_, ran) in known.items():
        for file, line in ran:
            who[file][line].add(name)
            who[file][0].add(name)
    return who


def choose(known: Known, who: dict[str, dict[int, set[str]]], mutant: Mutant) -> list[str]:
    """The tests that ran a mutant's lines, or its function's: in turn the shortest and most specific one, and one of
    the test function that had the fewest turns."""
    lines, found = who[str(mutant.file)], set()
    for numbers in (mutant.lines, mutant.function_lines or [0]):
        found = found or set().union(*(lines[number] for number in numbers))
    turns, order = collections.Counter(), []
    for name in sorted(found, key=lambda name: (known[name][0], name)):
        turns[name.partition("[")[0]] += 1
        order.append((turns[name.partition("[")[0]], known[name][0], name))
    narrow = sorted(found, key=lambda name: (len(known[name][1]) * (0.05 + known[name][0]), name))
    return list(dict.fromkeys(itertools.chain(*zip(narrow, [name for *_, name in sorted(order)], strict=True))))


def check_unchanged(file: Path, status: str, by: str) -> None:
    """End the run unless the tests passed on the source as it is, in the order and the fork of the mutants."""
    if status != "survived":
        what = f"{by} fails" if status == "killed" else f"{status} {by}".strip()
        sys.exit(f"{file.name} without any change: {what}; mend that test, or give it a quieter machine, first")


def forked(work: Callable[[], str], limit: float) -> tuple[str, str]:
    """What became of a mutant in a child: "survived", "killed" and by which test or crash, "timed out", or "stopped",
    which counts for nothing. `work` returns the test that failed."""
    out, end = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE, MAX_FILE))
        try:
            failed = work()
        except BaseException as error:
            failed = f"!{error!r}"
        os.write(end, failed.encode()[:4000])
        os._exit(bool(failed))
    os.close(end)
    start = time.perf_counter()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.perf_counter() - start > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(out)
            return "timed out", ""
        time.sleep(0.01)
    by = os.read(out, 4000).decode()
    os.close(out)
    assert not by.startswith("!"), by  # of this program, not of a test
    if os.WIFSIGNALED(ended[1]):
        number = os.WTERMSIG(ended[1])
        return ("killed" if number in CRASHES else STOPPED), f"signal {number}"
    if by.startswith(STOPPED):
        return STOPPED, by
    return ("killed" if by else STOPPED if ended[1] else "survived"), by
