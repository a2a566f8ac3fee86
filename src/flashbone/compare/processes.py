"""One process a run: started beside each other as far as asked, watched, and ended with the comparison."""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from flashbone.compare.jobs import Job

PRELOADED = ["flashbone.compare.worker", "trl.trainer.sft_trainer", "peft"]


@dataclasses.dataclass(frozen=True)
class Ended:
    """A run whose process has ended; a `signal` that ended it is not of its own making."""

    job: Job
    seconds: float
    signal: int | None


def run_all(jobs: Sequence[Job], folders: Path, at_once: int) -> Iterator[Ended]:
    """Run the jobs in their order, `at_once` of them side by side, each in a process of its own; yields each that has
    ended. When the caller stops asking, those that are running are ended.

    Args:
        jobs: The runs.
        folders: Where each has a folder of its name.
        at_once: On GPUs each has one for itself as long as there are enough; on CPUs they share the threads.
    """
    context = _context()
    places = _places(at_once)
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and places:
                job, place = waiting.pop(0), places.pop(0)
                running[_start(context, job, folders / job.name, place)] = (job, place, time.perf_counter())
            for process in _ended(running):
                job, place, since = running.pop(process)
                places.append(place)
                code = process.exitcode or 0
                yield Ended(job, time.perf_counter() - since, -code if code < 0 else None)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.join()


def _start(context: Any, job: Job, folder: Path, place: dict[str, Any]) -> Any:
    from flashbone.compare.worker import work

    process = context.Process(target=work, args=(dataclasses.asdict(job), folder, place))
    with _without_main():
        process.start()
    return process


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A new process imports the program that started it, which a run has no use for: a notebook's cannot be imported,
    and a script without a guard would start a comparison in each run."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _ended(running: Iterable[Any]) -> list[Any]:
    processes = list(running)
    wait([process.sentinel for process in processes])
    ended = [process for process in processes if not process.is_alive()]
    for process in ended:
        process.join()
    return ended


def _context() -> Any:
    """On CPUs runs are forked from a process that has imported everything and computed nothing, which saves seconds in
    each; with a GPU, or where forking is not to be had, each starts from nothing."""
    if os.name != "posix" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    with contextlib.suppress(AttributeError):
        context.set_forkserver_preload(PRELOADED)
    return context


def _places(at_once: int) -> list[dict[str, Any]]:
    """What each of the runs that go on at once may use."""
    if torch.cuda.is_available():
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
        return [{"gpu": gpus[slot % len(gpus)], "threads": None} for slot in range(at_once)]
    threads = None if at_once == 1 else max(1, torch.get_num_threads() // at_once)
    return [{"gpu": None, "threads": threads} for _ in range(at_once)]
