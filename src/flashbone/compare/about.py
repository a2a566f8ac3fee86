"""Where figures were made: versions, hardware, the commit of a checkout."""

import contextlib
import datetime
import functools
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import flashbone.errors
from flashbone import __version__
from flashbone.compare.results import Provenance

PACKAGES = ("torch", "transformers", "peft", "trl")


def device_of(training: Mapping[str, Any]) -> str:
    """The kind of device that runs with these arguments use: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() and not training.get("use_cpu") else "cpu"


def this_process(device: str) -> Provenance:
    """Where this process runs, if it runs on this kind of device."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"flashbone": __version__, **{name: version(name) for name in PACKAGES}}
    return Provenance(device, hardware, versions, commit(), datetime.date.today().isoformat())


def combined(places: Sequence[Provenance]) -> Provenance:
    """All kinds of hardware, versions and commits of several runs, and the last day."""

    def distinct(values: Iterable[str | None]) -> str:
        return " and ".join(dict.fromkeys(value for value in values if value is not None))

    packages = dict.fromkeys(name for place in places for name in place.versions)
    return Provenance(
        device=distinct(place.device for place in places),
        hardware=distinct(place.hardware for place in places),
        versions={name: distinct(place.versions.get(name, "none") for place in places) for name in packages},
        commit=distinct(place.commit for place in places) or None,
        date=max(place.date for place in places),
    )


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
