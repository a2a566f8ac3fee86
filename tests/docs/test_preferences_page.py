"""docs/preferences.md, from top to bottom, on a tiny Llama."""

import json
import math
from pathlib import Path

import pytest

from helpers.pages import run_page
from helpers.tiny_llama import write_tiny_llama


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_page_runs_from_top_to_bottom(place):
    write_tiny_llama(place / "HuggingFaceTB/SmolLM2-135M-Instruct")
    run = run_page("docs/preferences.md", replaced={"max_steps: 100": "max_steps: 2"})
    summary = json.loads(Path("runs/dpo/summary.json").read_text())
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.names["polite"](["a"], ["please sit"], ["b"]) == [1]
