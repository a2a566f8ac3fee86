"""Where a comparison was made: versions, hardware, the commit of a checkout."""

import contextlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import flashbone.errors
from flashbone import __version__

PACKAGES = ("torch", "transformers", "peft", "trl")


def versions() -> dict[str, str]:
    """Of everything that decides numbers."""
    return {"flashbone": __version__, **{name: version(name) for name in PACKAGES}}


def device() -> str:
    """cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


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
