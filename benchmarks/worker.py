"""A worker process: holds methods and does one repetition at a time when told to, in JSON lines over stdin and stdout.

Run by `benchmarks.workers` as `python -m benchmarks.worker NAME THREADS`; it ends when its input ends, so that a parent
that dies leaves no worker behind.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any, TextIO

from benchmarks.cases import Case, Setting
from benchmarks.methods import CURRENT, load_hosts

PACKAGES = ("torch", "transformers", "peft", "flashbone")


class Server:
    """What the requests act on: one case at a time, with the settings that were prepared for it."""

    def __init__(self, name: str) -> None:
        load_hosts(name)
        gc.freeze()  # What the imports made is never garbage: the collector need not go through it.
        self.name = name
        self.subject: Any = None
        self.repetitions: dict[str, Callable[[], dict[str, float]]] = {}

    def about(self) -> dict[str, Any]:
        """Versions of what the numbers come from."""
        names = PACKAGES if self.name == CURRENT else PACKAGES[:-1]
        versions = {name: importlib.metadata.version(name) for name in names}
        return {"versions": {"python": platform.python_version(), **versions}}

    def device(self, device: str) -> dict[str, Any]:
        """The name of the processor that "cpu" or "cuda" stands for, and whether it has instructions for bf16."""
        import torch

        from benchmarks.subjects import device_name

        has_bf16 = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return {"device": device_name(device), "has_bf16": has_bf16}

    def open(self, case: dict[str, Any]) -> dict[str, Any]:
        """Take up a new case; the former one and its settings are let go."""
        from benchmarks.subjects import SUBJECTS

        self.subject, self.repetitions = None, {}
        gc.collect()
        self.subject = SUBJECTS[case["kind"]](Case(**case))
        return self.device(case["device"])

    def prepare(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Build a setting's module, ready for its repetitions."""
        chosen = Setting(**setting)
        self.repetitions[chosen.label] = self.subject.prepare(chosen)
        return {}

    def measure(self, label: str) -> dict[str, Any]:
        """Do one repetition; the figures by metric."""
        return {"figures": self.repetitions[label]()}

    def predict(self, case: dict[str, Any], settings: list[dict[str, Any]], threads: int) -> dict[str, Any]:
        """What a layer would take by this machine's peaks, in milliseconds, with each setting."""
        from benchmarks.roofline.command import predict_layer

        return {"predicted_ms": predict_layer(Case(**case), [Setting(**setting) for setting in settings], threads)}

    def check(self, part: str, device: str, quick: bool) -> dict[str, Any]:
        """A part of `benchmarks.report.checks`."""
        from benchmarks.report import checks

        return checks.run(part, device, quick)

    def environment(self) -> dict[str, Any]:
        """What `flashbone env` tells, without where Python lies."""
        from flashbone.cli.env import environment

        found = environment()
        found["system"]["python"] = platform.python_version()
        return found

    def once(self, case: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
        """Open, prepare and measure in a process of its own, forked from this one, which has only imported so far."""
        if self.subject is not None:
            raise RuntimeError("a worker that has computed cannot be forked: its threads would be missing")
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            reply = answer(lambda: self._alone(case, setting))
            os.write(write_end, json.dumps(reply).encode())
            os._exit(0)
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            reply = pipe.read()
        _, status = os.waitpid(child, 0)
        if not reply:
            raise RuntimeError(f"its process ended with {os.waitstatus_to_exitcode(status)} (killed for memory?)")
        return json.loads(reply)

    def _alone(self, case: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
        opened = self.open(case)
        self.prepare(setting)
        return {**opened, **self.measure(Setting(**setting).label)}


def answer(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A call's reply, or its error in one line."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def serve(name: str, threads: int, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more."""
    import torch

    torch.set_num_threads(threads)
    server: Any = None

    def start() -> dict[str, Any]:
        nonlocal server
        server = Server(name)
        return server.about()

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    reply(answer(start))
    for line in requests:
        call, arguments = json.loads(line)
        reply(answer(lambda call=call, arguments=arguments: getattr(server, call)(**arguments)))


def main() -> None:
    """Keep stdout for replies: what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], int(sys.argv[2]), sys.stdin, replies)


if __name__ == "__main__":
    main()
