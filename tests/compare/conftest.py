"""A tiny language model, its rows, and comparisons small enough to run whole."""

import json
from pathlib import Path

import pytest
import yaml

from helpers.fixtures import _own_cache, llama
from helpers.tiny_llama import questions

__all__ = ["_own_cache", "llama"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """train.jsonl, test.jsonl and other.jsonl (other test rows); no row of one is in another."""
    folder = tmp_path_factory.mktemp("rows")
    parts = {"train": (0, "sat"), "test": (1, "ran"), "other": (2, "was")}
    for name, (start, verb) in parts.items():
        made = [
            {
                "prompt": f"{row['prompt']} {'. ' * (number // 8)}{', ' * start}",
                "completion": row["completion"] + f" {verb}",
            }
            for number, row in enumerate(questions(64 if name == "train" else 24))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture
def config(llama, rows, tmp_path):
    """Writes the YAML of a comparison: two methods, two rates, two seeds, four steps; fields may be changed."""

    def write(**changes) -> Path:
        fields = {
            "model": str(llama),
            "data": {"path": str(rows / "train.jsonl"), "eval": 16, "test": str(rows / "test.jsonl")},
            "methods": ["bone", "lora"],
            "budget": {"method": "bone", "r": 8},
            "learning_rates": [1e-3, 1e-2],
            "seeds": [0, 1],
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "eval_steps": 2,
                "use_cpu": True,
                "disable_tqdm": True,
            },
            "output": str(tmp_path / "out"),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**fields, **changes}))
        return path

    return write
