"""What docs/inspect.md shows is what the command prints."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from flashbone.inspect.model import inspect_model
from helpers.adapter_folders import write_adapter
from helpers.pages import ROOT, PageRun, blocks
from helpers.stand_ins import SMOLLM2

DRAWN = re.compile(r"\d\.\de-\d\d|\d+\.\d deg")  # depends on the blocks, which are random here


class Printed(PageRun):
    """Keeps what each command prints."""

    def command(self, words: list[str], where: str) -> None:
        with redirect_stdout(io.StringIO()) as out:
            super().command(words, where)
        self.names.setdefault("printed", []).append([line.rstrip() for line in out.getvalue().splitlines()])


def write_my_adapter(folder: Path) -> None:
    """An orthogonal adapter of SmolLM2-135M's 30 attention outputs and down projections."""
    names = [f"model.layers.{i}.{name}" for i in range(30) for name in ("self_attn.o_proj", "mlp.down_proj")]
    fields = {"mini_r": None, "base_model_name_or_path": SMOLLM2, "target_modules": ["o_proj", "down_proj"]}
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(64, 64, generator=generator) * 0.01 for name in names}
    file = write_adapter(folder, "orthogonal", drawn, r=64, **fields) / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})  # as PEFT does


@pytest.mark.slow
def test_the_examples_are_the_command_s_output(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(place / "Llama-2-7b")
    write_my_adapter(place / "my-adapter")
    names = Printed("docs/inspect.md").run().names
    shown = [block.text.rstrip().splitlines() for block in blocks("docs/inspect.md") if block.language == "text"][1:]
    assert len(names["printed"]) == len(shown) == 2
    for printed, lines in zip(names["printed"], shown, strict=True):
        printed, lines = ([DRAWN.sub("0", line).rstrip() for line in some] for some in (printed, lines))
        assert printed[: len(lines)] == lines
    printed, lines = names["printed"][0], shown[0]
    assert not printed[len(lines)]  # the notes are left out
    assert any("served by" in line for line in names["printed"][1][len(shown[1]) :])  # the last table is left out
    assert sum(group.count for group in names["blocks"]) == 60
    assert names["training_bytes"] > 0


def test_the_page_of_adapters_and_this_one_agree_with_the_presets(tmp_path):
    text = (ROOT / "docs" / "adapters.md").read_text()
    LlamaConfig().save_pretrained(tmp_path)
    published = inspect_model(tmp_path, {"r": 64}).recommended
    assert published is not None
    assert f"| 1B to 7B | {published.r} | {published.dropout} | 1e-5 |" in text
    assert published.orthogonal_eps == 1e-5
