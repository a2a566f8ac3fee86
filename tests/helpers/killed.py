"""Commands that write one answer for each row, killed after the fifth."""

import os
import signal
from pathlib import Path

from flashbone import cli
from flashbone.evaluate.answer_file import Appender
from helpers.forks import run_in_fork


def run_killed(argv: list[str], said: Path) -> None:
    """Run a command of flashbone until it has written five answers; what it prints goes into the file `said`."""

    def run() -> None:
        add, added = Appender.add, []

        def add_and_die(self, answered):
            add(self, answered)
            added.append(answered)
            if len(added) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Appender.add = add_and_die
        cli.main(argv)

    assert run_in_fork(run, said) == -signal.SIGKILL, said.read_text()
