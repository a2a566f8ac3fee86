"""README.md and CONTRIBUTING.md are followed as they stand, on a tiny model under the name that the README uses."""

import re

import pytest
import torch

from helpers.comparison import Promise, close, same_bits
from helpers.pages import ROOT, make_targets, run_page
from helpers.stand_ins import SMOLLM2
from helpers.tiny_llama import write_tiny_llama


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(place):
    from transformers import AutoModelForCausalLM

    write_tiny_llama(place / SMOLLM2)
    run = run_page("README.md")
    assert {"python", "bash"} <= set(run.ran)
    assert (place / "my-adapter" / "adapter_model.safetensors").exists()
    tokens = torch.arange(2, 12).view(2, 5)
    merged, base = run.names["merged"].eval(), AutoModelForCausalLM.from_pretrained(SMOLLM2).eval()
    with torch.no_grad():
        assert close(merged(tokens).logits, base(tokens).logits)
    got, want = merged.state_dict(), base.state_dict()
    assert got.keys() == want.keys()
    assert all(same_bits(got[name], want[name], Promise.EXACT) for name in want)  # untrained blocks are zero


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
    assert len(text.splitlines()) < 200
    assert all(re.search(rf"`{name}`|flashbone {name}", text) for name in COMMANDS)
