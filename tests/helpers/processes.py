"""Code in a process of its own: the tests' shape checks do not compile."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_apart(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in `folder`; its first arguments are the folders of the tests of hosts and of all tests."""
    command = [sys.executable, "-c", code, str(TESTS / "hosts"), str(TESTS)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
