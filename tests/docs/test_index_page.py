"""docs/index.md, the first page: all of it, on a tiny model and chats in the place of those that `make demo` leaves."""

import json
from pathlib import Path

import pytest

from helpers.comparison import close
from helpers.pages import run_page
from helpers.stand_ins import link_examples, write_rows
from helpers.tiny_llama import WORDS, write_tiny_llama

STEPS = {
    "max_steps: 24": "max_steps: 4, use_cpu: true",
    "--output runs/second": "--output runs/second --training.max_steps 4",
}


def chat(number: int) -> dict:
    """One question and its answer, unlike all others."""
    words = WORDS.split()
    question = " ".join(words[(number * step) % len(words)] for step in (1, 3, 7))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "it was red"}]}


@pytest.mark.slow
def test_the_first_page_runs_from_top_to_bottom(place, capsys):
    link_examples(place)
    write_tiny_llama(place / ".cache/demo/smollm2")
    write_rows(".cache/demo/chat/train.jsonl", map(chat, range(60)))
    write_rows(".cache/demo/chat/test.jsonl", map(chat, range(60, 70)))
    run = run_page("docs/index.md", replaced=STEPS)
    assert run.ran == ["bash", "python", "python", "bash", "yaml", "bash", "bash"]
    losses = run.names["losses"]
    assert losses[-1] < losses[0]
    assert close(run.names["merged"](**run.names["question"]).logits, run.names["adapted"])
    assert "merged and adapted differ by" in capsys.readouterr().out
    for name in ("second", "mine"):
        summary = json.loads(Path(f"runs/{name}/summary.json").read_text())
        assert summary["eval_loss_after"] < summary["eval_loss_before"]
