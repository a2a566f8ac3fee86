"""A whole run over chats: `flashbone train` with bone beside TRL's SFTTrainer with PEFT's LoRA and MiSS, on the same
rows, each in a process of its own."""

from __future__ import annotations

import tempfile

from benchmarks.cases import ROOT, Setting
from benchmarks.errors import UsageError
from benchmarks.rows import Row
from benchmarks.run import Run

DEMO = ROOT / ".cache" / "demo"
METHODS = ("bone", "lora", "miss")
ROWS = 64  # of the corpus's 893
# Conversations of four exchanges: learned as one row, or as a row for each answer with what went before it.
OF_ANSWERS = ("conversations", "answers")


def measure(run: Run) -> list[Row]:
    """The rows of a part.

    Raises:
        UsageError: the model and the chats are not there.
    """
    quick = run.options.model in ("", "tiny") and run.options.quick
    if not quick and not (DEMO / "smollm2").is_dir():
        prepare = "`make .venv/.demo` and `python -m examples.demo.prepare`"
        raise UsageError(f"SmolLM2 and the chats are not there yet: run {prepare} first")
    # PEFT's methods would learn the same of both.
    names = run.options.pick(METHODS[:1] if run.part in OF_ANSWERS else METHODS)
    with tempfile.TemporaryDirectory() as scratch:
        shape = {
            "model": "tiny" if quick else "smollm2-135m",
            "rows": 8 if quick else ROWS,
            "batch": 4,
            "how": run.part,
        }
        case = run.case("train", shape, scratch=scratch)
        return run.measure(case, [Setting(name, 16 if quick else 64) for name in names], own_process=True)
