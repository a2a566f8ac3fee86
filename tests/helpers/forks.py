"""A command in a fork of the test's process: what is imported here need not be imported there, for seconds."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

MOST_SECONDS = 200


def run_in_fork(run: Callable[[], object], said: Path) -> int:
    """The exit code of a process that calls `run`, negative for a signal; what it prints goes into the file `said`."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            said_to = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(said_to, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            torch.set_num_threads(1)  # a fork has no threads of OpenMP, and would wait for them for ever
            run()
            code = 0
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    end = time.monotonic() + MOST_SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.02)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(ended[1])
