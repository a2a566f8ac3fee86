"""Prepare preferences from the demo's chat corpus: a question's own answer, rather than one to another question.

python -m examples.preferences.prepare
"""

import random
import sys
from pathlib import Path

from examples.demo import prepare as demo
from examples.offline import prepare_all, read_jsonl, write_jsonl

CACHE = Path(".cache/preferences")
TEST_ROWS = 32  # each held-out pair costs four forward passes


def with_rejected(rows: list[dict], seed: int = 0) -> list[dict]:
    """Each conversation of one exchange as a preference: its answer, rather than that to another question."""
    others = rows[:]
    random.Random(seed).shuffle(others)
    pairs = []
    for row, other in zip(rows, others, strict=True):
        (question, chosen), (_, rejected) = row["messages"], other["messages"]
        if chosen["content"] != rejected["content"]:
            pairs.append({"prompt": [question], "chosen": [chosen], "rejected": [rejected]})
    return pairs


def prepare_pairs(folder: Path) -> None:
    """Write train.jsonl and test.jsonl with the columns `prompt`, `chosen` and `rejected`."""
    for name in ("train", "test"):
        pairs = with_rejected(read_jsonl(demo.CACHE / "chat" / f"{name}.jsonl"))
        write_jsonl(folder / f"{name}.jsonl", pairs if name == "train" else pairs[:TEST_ROWS])


def main() -> int:
    """Prepare whatever is not there yet; the exit code."""
    return demo.main() or prepare_all({CACHE: prepare_pairs})


if __name__ == "__main__":
    sys.exit(main())
