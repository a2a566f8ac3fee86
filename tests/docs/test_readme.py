"""README.md and CONTRIBUTING.md are followed as they stand, on a tiny model under the name that the README uses."""

import re

import pytest
import torch

from helpers.comparison import close
from helpers.pages import ROOT, make_targets, run_page
from helpers.stand_ins import SMOLLM2
from helpers.tiny_llama import write_tiny_llama


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16's own default
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # the trainer's default
def test_the_readme_runs_from_top_to_bottom(place, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    write_tiny_llama(place / SMOLLM2)
    run = run_page("README.md", replaced={"generate my-adapter": "generate my-adapter --max-new-tokens 8"})
    assert run.ran == ["bash", "python", "bash", "python"]
    losses = [entry["loss"] for entry in run.names["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert capsys.readouterr().out.strip()
    tokens = torch.arange(2, 12).view(2, 5)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SMOLLM2), "my-adapter").eval()
    with torch.no_grad():
        assert close(run.names["merged"].eval()(tokens).logits, model(tokens).logits)
        with model.disable_adapter():
            assert not close(model(tokens).logits, run.names["merged"](tokens).logits)


@pytest.mark.slow
def test_the_commands_of_contributing_exist(place):
    assert set(run_page("CONTRIBUTING.md").ran) == {"bash"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_make_targets_in_the_text_exist(page):
    named = {target for words in re.findall(r"`make ([\w -]+)`", (ROOT / page).read_text()) for target in words.split()}
    assert named <= make_targets()


def placeholders(text: str) -> list[str]:
    """Cells of tables, or parts of them between commas, that are capitals alone, for figures that are still to come."""
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    return [part for cell in cells for part in re.split(r", *", cell.strip()) if re.fullmatch("[A-Z]{4,}", part)]


def test_capitals_in_the_place_of_a_figure_are_found():
    text = "| `make test` | TEST | 12 MIB |\nTESTS, | DOCS |\n| `RWKV` | COVERAGE, hours | LoRA |\n"
    assert placeholders(text) == ["TEST", "COVERAGE"]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_no_figure_is_missing(page):
    assert placeholders((ROOT / page).read_text()) == []


def test_the_readme_is_short_and_names_every_command():
    from flashbone.cli import COMMANDS

    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert all(re.search(rf"`{name}`|flashbone {name}", text) for name in COMMANDS)
