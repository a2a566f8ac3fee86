"""Where a comparison was made: versions, hardware, the commit of a checkout."""

import contextlib
import datetime
import functools
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import flashbone.errors
from flashbone import __version__
from flashbone.compare.config import Comparison

PACKAGES = ("torch", "transformers", "peft", "trl")


def versions() -> dict[str, str]:
    """Of everything that decides numbers."""
    return {"flashbone": __version__, **{name: version(name) for name in PACKAGES}}


def on_gpu(training: Mapping[str, Any]) -> bool:
    """Whether runs with these arguments use a GPU."""
    return torch.cuda.is_available() and not training.get("use_cpu")


def here(comparison: Comparison) -> dict[str, Any]:
    """What decides numbers besides the comparison itself, for a run in this process."""
    return place("cuda" if on_gpu(comparison.training) else "cpu")


def place(device: str) -> dict[str, Any]:
    """Where this process runs, if it runs on this kind of device."""
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def together(places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several runs: all kinds of hardware, the versions and commits that there were, and the last day."""

    def all_of(name: str) -> str | None:
        return " and ".join(dict.fromkeys(str(one[name]) for one in places if one[name] is not None)) or None

    packages = {name: None for one in places for name in one["versions"]}
    found = {name: dict.fromkeys(one["versions"].get(name, "none") for one in places) for name in packages}
    return {
        "device": all_of("device"),
        "hardware": all_of("hardware"),
        "versions": {name: " and ".join(numbers) for name, numbers in found.items()},
        "commit": all_of("commit"),
        "date": max(one["date"] for one in places),
    }


def _processor() -> str:
    """The processor's name, with the threads that torch uses."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" where files were changed; None elsewhere."""
    package = Path(flashbone.errors.__file__).parent
    command = ("git", "-C", str(package), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        tracked = subprocess.run(
            (*command[:3], "ls-files", "--error-unmatch", "errors.py"), capture_output=True, check=False
        )
        if tracked.returncode == 0:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None
