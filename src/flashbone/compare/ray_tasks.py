"""Runs of a comparison as tasks of a Ray cluster, whose machines see the same disk."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flashbone.compare import processes
from flashbone.compare.runs import RunSpec
from flashbone.errors import ConfigError, one_line


def check_ray() -> None:
    """Raise ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("jobs: ray needs the package ray: pip install ray")


def run_tasks(specs: Sequence[RunSpec], folders: Path) -> Iterator[processes.Ended]:
    """Run these on the cluster of RAY_ADDRESS, or on this machine; yields each that has ended, in any order.

    A run has a GPU of its own, or on CPUs as many cores as torch uses threads here (OMP_NUM_THREADS). If this program
    ends, Ray ends its tasks; what has ended keeps its result.

    Args:
        specs: The runs, which begin in their order.
        folders: Where each has a folder of its name.

    Raises:
        ConfigError: a machine of the cluster has another flashbone or none, or not this folder.
    """
    if not specs:
        return
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(log_to_driver=False, logging_level="warning")
    share = {"num_gpus": 1} if processes.uses_gpu(specs[0]) else {"num_cpus": torch.get_num_threads()}
    task = ray.remote(max_retries=0, **share)(_run)
    here = Path.cwd()
    running = {task.remote(dataclasses.asdict(spec), here, folders): spec for spec in specs}
    try:
        while running:
            (done,), _ = ray.wait(list(running))
            spec = running.pop(done)
            try:
                yield dataclasses.replace(ray.get(done), spec=spec)
            except ray.exceptions.RayTaskError as error:  # what a run itself fails by is its result
                raise ConfigError(
                    f"jobs: ray: a task could not start its run: {one_line(error.cause, 200)}; "
                    f"every machine needs this flashbone and the folder {here}"
                ) from None
            except ray.exceptions.RayError:  # its machine or its worker is gone
                yield processes.Ended(spec, 0.0, None)
    finally:
        for waiting in running:
            ray.cancel(waiting, force=True)
        ray.shutdown()


def _run(plain: dict[str, Any], here: Path, folders: Path) -> processes.Ended:
    """One run on some machine of the cluster, in a process that ends with Ray's."""
    os.chdir(here)  # paths may be relative
    (ended,) = processes.run_all([RunSpec(**plain)], folders, 1)
    return ended
