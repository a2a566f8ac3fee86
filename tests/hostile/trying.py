"""One damaged file through one command, in this process and under limits: what is wrong with the answer."""

import contextlib
import io
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

from flashbone.cli import main
from hostile.damage import damaged
from hostile.originals import COMMANDS, SLOWER, inside

SECONDS, MEMORY = 2.0, 300 << 10  # of the processor; KiB of growth
MOST = 500 + len("flashbone compare: error: \n")


class _TooLong(BaseException):
    pass


def limit_memory() -> None:
    """Of this process from now on: a GiB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)


def warm_up(originals: Path, place: Path, file: str) -> list[str]:
    """What is wrong with the answers to the whole file; what they import is not counted afterwards."""
    wrong = []
    for number, command in enumerate(COMMANDS[file][1]):
        shutil.copytree(originals, place / str(number))
        with inside(place / str(number)):
            code, printed, error = _run(command, 60)
        wrong += [] if code == 0 or "absent" in command else [f"{' '.join(command)}: {code} {printed} {error}"]
    return wrong


def attempt(originals: Path, place: Path, file: str, seed: int) -> tuple[list[str], bool]:
    """What is wrong with the answer to the damaged file (empty: nothing is), and whether the command took it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(originals, place)
    target = place / file
    target.write_bytes(damaged(target.read_bytes(), file, seed))
    commands = COMMANDS[file][1]
    command = commands[seed % len(commands)]
    before = _state(place)
    limit = SLOWER.get(command[0], SECONDS)
    start, grown = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with inside(place):
        code, printed, error = _run(command, 2 * limit)
    problems = [f"it took {spent:.1f} s"] if (spent := time.process_time() - start) > limit else []
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    problems += [f"it took {grown >> 10} MiB"] if grown > MEMORY else []
    problems += [f"wrote outside: {sorted(changed)}"] if (changed := _state(place) ^ before) else []
    problems += _wrong(code, printed, error)
    return [f"{file} {seed} {' '.join(command)}: {problem}" for problem in problems], code == 0


def _run(command: list[str], seconds: float) -> tuple[int | str, str, str]:
    def stop(*_: object) -> None:
        raise _TooLong

    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default")  # as a command has it; in tests they are errors
            code: int | str = main(command)
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return code, out.getvalue(), err.getvalue()


def _wrong(code: int | str, printed: str, error: str) -> list[str]:
    problems = [] if code in (0, 1) else [f"code {code}, {error[-300:]!r}"]
    lines = [line for line in error.splitlines() if ": error: " in line and line.startswith("flashbone ")]
    if code == 1 and len(lines) != 1:
        problems.append(f"{len(lines)} lines of error: {error[-300:]!r}")
    problems += [f"a line of {len(line)}" for line in lines if len(line) > MOST]
    problems += ["a traceback"] if "Traceback (most recent call last)" in error + printed else []
    problems += [f"unexpected: {line}" for line in lines if "this is a bug" in line]
    problems += ["control characters"] if any(c < " " and c not in "\n\r\t" for c in "".join(lines) + printed) else []
    return problems


def _state(place: Path) -> set[tuple[str, int, int]]:
    """All files but those in OUT."""
    files = (path for path in place.rglob("*") if path.is_file() and path.relative_to(place).parts[0] != "OUT")
    return {(str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns) for path in files}
