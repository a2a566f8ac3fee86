"""What a child process costs: seconds of CPU, which a busy machine stretches far less than those of the clock."""

import os
import subprocess
import time
from collections.abc import Sequence

ROUNDS = 9


def cpu_and_wall_ms(command: Sequence[str]) -> tuple[float, float]:
    """Milliseconds of CPU, user and system, and of the clock, that one run of the command took."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return 1000 * (usage.ru_utime + usage.ru_stime), 1000 * wall


def least_ms(commands: Sequence[Sequence[str]], rounds: int = ROUNDS) -> list[tuple[float, float]]:
    """The least CPU and clock of each command, since others only add to it; they take turns, so that all see the same
    machine."""
    runs = [[cpu_and_wall_ms(command) for command in commands] for _ in range(rounds)]
    return [(min(cpu for cpu, _ in column), min(wall for _, wall in column)) for column in zip(*runs, strict=True)]
