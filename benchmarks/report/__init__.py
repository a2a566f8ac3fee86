"""`report`: all that wants a GPU, in one folder: report.html, rows.jsonl, environment.json.

A part that fails, lacks something or takes too long is named, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Setting
from benchmarks.methods import CURRENT
from benchmarks.rounds import Plan
from benchmarks.rows import Row, save, spread
from benchmarks.workers import Pool

SECONDS = 450  # for all parts; what has not begun by then is left out
PEERS = "bone,bat-row,bat-col,mini,orthogonal,lora,dora,oft,miss"
FEWER = "bone,bat-row,lora,miss"


@dataclass
class Part:
    """What became of a part: its rows, and in words what failed; `missing` is why it could not run at all."""

    name: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    missing: str = ""

    @property
    def verdict(self) -> str:
        """One word, or why not."""
        wrong = [row for row in self.rows if row.metric == "relative_error" and not row.median <= row.shape["limit"]]
        if self.missing:
            return f"not run: {self.missing}"
        if self.failures or wrong:
            return f"failed: {len(self.failures)} errors, {len(wrong)} results beyond their limits"
        return "done"


@dataclass(frozen=True)
class Job:
    """What all parts are asked for."""

    pool: Pool
    device: str
    quick: bool
    out: Path

    @property
    def rows(self) -> Path:
        """The file of rows."""
        return self.out / "rows.jsonl"

    @property
    def worker(self) -> Any:
        """The worker of today's PEFT."""
        return self.pool.get(CURRENT)[0]


def checked(part: str) -> Callable[[Job, Part], None]:
    """A part of `benchmarks.report.checks`."""

    def run(job: Job, found: Part) -> None:
        from benchmarks.roofline.command import dated

        reply = job.worker.ask("check", part=part, device=job.device, quick=job.quick)
        about = {
            "device": job.worker.ask("device", device=job.device)["device"],
            "versions": job.worker.versions,
            **dated(),
        }
        for figure in reply["figures"]:
            value = figure.pop("value")
            found.rows.append(Row(part, "report", r=0, adapters=1, **figure, **spread([value]), **about))
        save(job.rows, found.rows)
        found.failures, found.missing = reply["failures"], reply.get("unavailable", "")

    return run


def benchmarked(words: str, quick_words: str) -> Callable[[Job, Part], None]:
    """A benchmark, at sizes for a GPU or tiny ones."""

    def measure(job: Job, found: Part) -> None:
        from benchmarks.options import options_of, parser
        from benchmarks.run import run

        line = f"{quick_words} --quick --threads 1" if job.quick else words
        command = [*line.split(), "--device", job.device, "--out", str(job.rows)]
        found.rows = run(options_of(parser().parse_args(command)), job.pool, is_checked=True)

    return measure


def predicted(job: Job, found: Part) -> None:
    """A layer by this device's peaks, beside its time."""
    from benchmarks.roofline.command import beside

    sizes = ((32, 32, 64),) if job.quick else ((8192, 2048, 2048), (8192, 2048, 8192), (4096, 4096, 4096))
    names = ("bone", "lora") if job.quick else PEERS.split(",")
    settings = [Setting(name, 8 if job.quick else 64) for name in names]
    for tokens, into, out in sizes:
        shape = {"tokens": tokens, "in": into, "out": out}
        case = Case("layer", shape, "float32" if job.device == "cpu" else "bfloat16", job.device)
        found.rows += beside(job.pool, case, settings, Plan(2 if job.quick else 10, 1))
    save(job.rows, found.rows)


# memory is first: it forks its worker, which must not have computed yet.
TINY = "--methods bone,lora --rounds 1"
PARTS: dict[str, Callable[[Job, Part], None]] = {
    "memory, 1B": benchmarked(
        f"memory --part main --model llama-3.2-1b --dtype bf16-autocast --rounds 1 --methods {PEERS}",
        f"memory --part main --dtype bf16-autocast {TINY}",
    ),
    "correctness": checked("correctness"),
    "triton": checked("triton"),
    "4-bit base": checked("4-bit base"),
    "step, 1B": benchmarked(
        f"step --part main --model llama-3.2-1b --dtype bf16-autocast --rounds 5 --methods {PEERS}",
        f"step --part main --dtype bf16-autocast {TINY}",
    ),
    "layer": benchmarked(
        f"layer --part shapes --dtype bf16 --rounds 10 --methods {PEERS}", f"layer --part shapes --dtype bf16 {TINY}"
    ),
    "decode": benchmarked(f"decode --rounds 15 --methods {FEWER}", f"decode --dtype bf16 {TINY}"),
    "roofline": predicted,
    "mixed, 1B": benchmarked(
        f"mixed --model llama-3.2-1b --dtype bf16 --rounds 5 --methods {FEWER}",
        f"mixed --part decode --dtype bf16 {TINY}",
    ),
    "step, 3B": benchmarked(
        f"step --part targets --model llama-3.2-3b --dtype bf16-autocast --rounds 3 --methods {FEWER}",
        f"step --part targets --dtype bf16-autocast {TINY}",
    ),
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options."""
    command.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    command.add_argument("--out", type=Path, default=Path("runs/gpu-report"), help="the folder (default: %(default)s)")
    command.add_argument("--quick", action="store_true", help="tiny sizes, which say nothing but that it runs")


def main(given: argparse.Namespace, pool: Pool | None = None) -> int:
    """Run all parts; 0 if the report is written, whatever became of them.

    Raises:
        BenchmarkError: the device does not exist.
    """
    from benchmarks.report.page import written

    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "rows.jsonl").unlink(missing_ok=True)
    parts, start = [], time.monotonic()
    workers = contextlib.nullcontext(pool) if pool else Pool(1 if given.quick else 2)
    with workers as used, (given.out / "log.txt").open("w", encoding="utf-8") as log:
        job = Job(used, given.device, given.quick, given.out)
        job.worker.ask("device", device=given.device)  # fails where there is none
        environment = job.worker.ask("environment")
        for name, run in PARTS.items():
            left = SECONDS - (time.monotonic() - start)
            with contextlib.redirect_stdout(log):
                part = attempted(name, run, job, left)
            parts.append(part)
            print(f"{name:<12} {part.seconds:5.0f} s  {part.verdict}", flush=True)
            for failure in part.failures:
                print(f"             {failure}")
    environment["report"] = {"device": given.device, "seconds": f"{time.monotonic() - start:.0f}"} | (
        {"sizes": "tiny: these figures say nothing"} if given.quick else {}
    )
    (given.out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    (given.out / "report.html").write_text(written(parts, environment), encoding="utf-8")
    print(f"{given.out / 'report.html'}")
    return 0


def attempted(name: str, run: Callable[[Job, Part], None], job: Job, seconds: float) -> Part:
    """A part, ended when its time is over."""
    part = Part(name)
    if seconds <= 0:
        part.missing = "no time was left"
        return part
    start = time.monotonic()
    alarm = threading.Timer(seconds, job.pool.kill)
    alarm.start()
    try:
        run(job, part)
    except Exception as error:  # whatever it is, the parts after it go on
        ended = time.monotonic() - start >= seconds
        part.failures.append(
            "its time was over" if ended else f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
        job.pool.close()  # the next part starts a worker of its own
    finally:
        alarm.cancel()
        part.seconds = time.monotonic() - start
    return part
