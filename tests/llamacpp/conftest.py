"""What llama.cpp's converters make of tiny models; the examples are imported from the root of the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LLAMA_CPP = Path(sys.prefix) / "llama.cpp"  # the converters
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The folder that convert.py writes."""
    out = tmp_path_factory.mktemp("converted")
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent / "src")}
    command = [sys.executable, str(HERE / "convert.py"), str(LLAMA_CPP), str(out)]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=250)
    return out
