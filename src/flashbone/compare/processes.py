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

from flashbone.compare.about import device_of
from flashbone.compare.runs import RunSpec

PRELOADED = ["flashbone.compare.worker", "trl.trainer.sft_trainer", "peft"]
_SHOWN = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Slot:
    """What a run may use: the number of a GPU, or so many threads; None for all."""

    gpu: str | None
    threads: int | None


@dataclasses.dataclass(frozen=True)
class Ended:
    """A run whose process has ended, and the signal that killed it, if any."""

    spec: RunSpec
    seconds: float
    signal: int | None


def run_all(specs: Sequence[RunSpec], folders: Path, at_once: int) -> Iterator[Ended]:
    """Run these in their order, `at_once` of them side by side, each in a process of its own; yields each that has
    ended. When the caller stops asking, those that are running are ended.

    Args:
        specs: The runs.
        folders: Where each has a folder of its name.
        at_once: On GPUs each has one for itself as long as there are enough; on CPUs they share the threads.
    """
    on_gpu = bool(specs) and uses_gpu(specs[0])
    context, slots = _context(on_gpu), _slots(at_once, on_gpu)
    waiting, running = list(specs), {}
    try:
        while waiting or running:
            while waiting and slots:
                spec, slot = waiting.pop(0), slots.pop(0)
                running[_start(context, spec, folders / spec.name, slot)] = (spec, slot, time.perf_counter())
            for process in _ended(running):
                spec, slot, since = running.pop(process)
                slots.append(slot)
                code = process.exitcode or 0
                yield Ended(spec, time.perf_counter() - since, -code if code < 0 else None)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.join()


def rehearsal(spec: RunSpec) -> str:
    """What is wrong with the arguments and the data of a run, in one line; empty if nothing is."""
    from flashbone.compare.worker import rehearse

    context = _context(uses_gpu(spec))
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=rehearse, args=(dataclasses.asdict(spec), send))
    with _without_main():
        process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:  # it was killed; the runs will show why
        return ""
    finally:
        process.join()


def uses_gpu(spec: RunSpec) -> bool:
    """Whether a run trains on a GPU."""
    return device_of(spec.recipe["training"]) == "cuda"


def _start(context: Any, spec: RunSpec, folder: Path, slot: Slot) -> Any:
    from flashbone.compare.worker import work

    process = context.Process(target=work, args=(dataclasses.asdict(spec), folder, slot.threads))
    with _without_main(), _only_gpu(slot.gpu):
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
    each; with a GPU, or where forking does not exist, each starts from nothing."""
    if not sys.platform.startswith("linux") or on_gpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _slots(at_once: int, on_gpu: bool) -> list[Slot]:
    """What each of the runs that go on at once may use."""
    if on_gpu:
        shown = os.environ.get(_SHOWN)
        gpus = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
        return [Slot(gpus[slot % len(gpus)], None) for slot in range(at_once)]
    threads = None if at_once == 1 else max(1, torch.get_num_threads() // at_once)
    return [Slot(None, threads) for _ in range(at_once)]
