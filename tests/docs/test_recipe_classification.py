"""docs/recipes/classification.md, from top to bottom, on a tiny BERT and tickets that can be told apart by a word."""

import csv
import json
from pathlib import Path

import datasets
import pytest

from helpers.pages import run_page
from helpers.stand_ins import write_tiny_bert

TEAMS = {"billing": ["invoice", "refund", "price"], "hardware": ["screen", "cable"], "press": ["interview"]}
COUNTS = {"billing": 40, "hardware": 40, "press": 20}
FILLERS = ["the", "is", "wrong", "stays", "dark", "my", "a", "please", "help", "with", "today"]


def write_tickets(path: Path) -> None:
    """Messages of three teams, some of them twice."""
    rows = []
    for team, words in TEAMS.items():
        for number in range(COUNTS[team]):
            one, two, three = (FILLERS[(number * step) % len(FILLERS)] for step in (1, 3, 7))
            rows.append((f"{one} {words[number % len(words)]} {two} {three} {FILLERS[number // 11]}", team))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("message", "team"), *rows, *rows[:5]])


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    words = [word for team in TEAMS.values() for word in team] + FILLERS
    sizes = {"hidden_size": 48, "intermediate_size": 64, "initializer_range": 0.1}
    write_tiny_bert(tmp_path / "sentence-transformers/all-MiniLM-L6-v2", words, **sizes)
    write_tickets(tmp_path / "tickets.csv")
    run = run_page("docs/recipes/classification.md", replaced={"max_steps: 32": "max_steps: 64"})
    assert set(run.ran) == {"python", "bash", "yaml"}

    train, test = (
        [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test")
    )
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert {row["label"] for row in test} == {row["label"] for row in train} == set(TEAMS)
    assert len({row["text"] for row in train}) == len(train)

    summary = json.loads(Path("runs/sort/summary.json").read_text())
    assert summary["labels"] == sorted(TEAMS)
    assert summary["eval_accuracy_after"] > 0.9 > summary["eval_accuracy_before"]
    assert [found["label"] for found in run.names["sort"](run.names["texts"])] == ["billing", "hardware"]
    (evaluation,) = json.loads(Path("results/sort/results.json").read_text())["evaluations"]
    assert evaluation["figures"][0]["value"] == pytest.approx(summary["eval_accuracy_after"])
