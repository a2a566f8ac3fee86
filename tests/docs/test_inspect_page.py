"""What docs/inspect.md shows is what the command prints."""

import re
from pathlib import Path

from transformers import LlamaConfig

from flashbone.cli import main
from flashbone.report.inspect.model import inspect_model

PAGE = (Path(__file__).parent.parent.parent / "docs" / "inspect.md").read_text()


def test_the_example_of_a_model_is_the_commands_output(tmp_path, monkeypatch, capsys):
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "Llama-2-7b")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    command = re.search(r"    \$ flashbone (inspect Llama-2-7b .*)\n((?:    .*\n|\n)*)", PAGE)
    assert command
    assert main(command[1].split()) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = [line.removeprefix("    ").rstrip() for line in command[2].rstrip().splitlines()]
    assert printed[: len(shown)] == shown
    assert not printed[len(shown)]  # the notes are left out


def test_the_page_of_adapters_and_this_one_agree_with_the_presets(tmp_path):
    text = (Path(__file__).parent.parent.parent / "docs" / "adapters.md").read_text()
    LlamaConfig().save_pretrained(tmp_path)
    published = inspect_model(tmp_path, {"r": 64}).recommended
    assert published is not None
    assert f"| 1B to 7B | {published.r} | {published.dropout} | 1e-5 |" in text
    assert published.orthogonal_eps == 1e-5
