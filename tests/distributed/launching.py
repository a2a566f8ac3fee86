"""accelerate's launcher with one of our examples, as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"


def launch(engine: str, *command: str, timeout: float = 240) -> None:
    """Run the command in two processes, on a free port; fails with what they said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / f"{engine}.yaml")]
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
