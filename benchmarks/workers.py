"""The parent's side of the workers: starting, asking and ending them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from benchmarks.cases import ROOT
from benchmarks.errors import BenchmarkError, UsageError
from benchmarks.methods import OLD

OLD_PEFT = ROOT / ".venv" / "peft-0.18.1"


class Worker:
    """A subprocess that answers one request at a time.

    Raises:
        BenchmarkError: a request failed, or the process is gone; the message is one line.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, str(threads)],
            cwd=ROOT,
            env=_environment(name, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,
        )
        self._about: dict[str, Any] | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python and of the packages that its methods run with."""
        if self._about is None:
            self._about = self._reply("start")
        return self._about["versions"]

    def ask(self, call: str, about: str = "", **arguments: Any) -> dict[str, Any]:
        """Have a method of `benchmarks.worker.Server` called; `about` names the setting in an error."""
        _ = self.versions
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([call, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It is gone: the missing reply says so.
        return self._reply(f"{call} {about}".strip())

    def _reply(self, task: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise BenchmarkError(f"worker {self.name}, {task}: it ended with code {code}; {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(f"worker {self.name}, {task}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")

    def kill(self) -> None:
        """End the process and what it forked, whatever they do; a request that waits for its reply fails."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """The same, and let its files go."""
        self.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            if file is not None:
                file.close()


class Pool:
    """The workers of a run, started when they are first needed, ended with the `with` block."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._workers: dict[str, Worker] = {}

    def get(self, *names: str) -> list[Worker]:
        """The workers of these environments; those that are new start side by side.

        Raises:
            UsageError: PEFT 0.18.1 is asked for and not there.
        """
        for name in names:
            if name == OLD and not OLD_PEFT.is_dir():
                missing = OLD_PEFT.relative_to(ROOT)
                raise UsageError(f"{missing} is missing: run `make .venv/.dev`, or leave peft-bone and peft-bat out")
            if name not in self._workers:
                self._workers[name] = Worker(name, self.threads)
        return [self._workers[name] for name in names]

    def __enter__(self) -> Pool:
        return self

    def kill(self) -> None:
        """End what the workers do, from another thread; they are still to be closed."""
        for worker in list(self._workers.values()):
            worker.kill()

    def close(self) -> None:
        """End the workers; those that are asked for later are new."""
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environment(name: str, threads: int) -> dict[str, str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # One heap for all threads: which of several a block comes from depends on chance, and so would the peak.
        "MALLOC_ARENA_MAX": "1",
    }
    environment.setdefault("HF_HUB_OFFLINE", "1")
    if name == OLD:
        environment["PYTHONPATH"] = os.pathsep.join([str(OLD_PEFT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment
