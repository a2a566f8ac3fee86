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

from flashbone.compare import about
from flashbone.compare.jobs import Job

PRELOADED = ["flashbone.compare.worker", "trl.trainer.sft_trainer", "peft"]


_SHOWN = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Place:
    """What a run may use: the number of a GPU, or so many threads; None for all."""

    gpu: str | None
    threads: int | None


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
    on_gpu = bool(jobs) and about.on_gpu(jobs[0].recipe["training"])
    context, places = _context(on_gpu), _places(at_once, on_gpu)
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


def rehearsal(job: Job) -> str:
    """What is wrong with the arguments and the data of a job, in one line; nothing if all is well."""
    from flashbone.compare.worker import rehearse

    context = _context(about.on_gpu(job.recipe["training"]))
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=rehearse, args=(dataclasses.asdict(job), send))
    with _without_main():
        process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:  # its end was not of its own making, and the runs will tell
        return ""
    finally:
        process.join()


def _start(context: Any, job: Job, folder: Path, place: Place) -> Any:
    from flashbone.compare.worker import work

    process = context.Process(target=work, args=(dataclasses.asdict(job), folder, place.threads))
    with _without_main(), _only_gpu(place.gpu):
        process.start()
    return process


@contextlib.contextmanager
def _only_gpu(gpu: str | None) -> Iterator[None]:
    """A process that starts now sees this GPU alone; it looks before any code of ours runs in it."""
    before = os.environ.get(_SHOWN)
    if gpu is not None:
        os.environ[_SHOWN] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            os.environ.pop(_SHOWN)
            if before is not None:
                os.environ[_SHOWN] = before


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


def _context(on_gpu: bool) -> Any:
    """On CPUs runs are forked from a process that has imported everything and computed nothing, which saves seconds in
    each; with a GPU, or where forking is not to be had, each starts from nothing."""
    if not sys.platform.startswith("linux") or on_gpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _places(at_once: int, on_gpu: bool) -> list[Place]:
    """What each of the runs that go on at once may use."""
    if on_gpu:
        shown = os.environ.get(_SHOWN)
        gpus = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
        return [Place(gpus[slot % len(gpus)], None) for slot in range(at_once)]
    threads = None if at_once == 1 else max(1, torch.get_num_threads() // at_once)
    return [Place(None, threads) for _ in range(at_once)]
