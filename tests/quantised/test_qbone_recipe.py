"""docs/recipes/qbone.md, from top to bottom, on a tiny Llama in 4 bits on the CPU."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from flashbone.tuner.layers.layer import bone_layers
from helpers.comparison import Promise, same_bits
from helpers.pages import ROOT, PageRun, blocks

pytestmark = pytest.mark.beside

PAGE = "docs/recipes/qbone.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What needs no GPU's time: twelve steps at a rate for a tiny model.
SMALL = {"num_train_epochs: 1": "max_steps: 12", "2.0e-4": "1.0e-2", "max_length: 1024": "max_length: 64"}


@pytest.fixture
def bitsandbytes():
    reason = "bitsandbytes is not installed; `make test-all` brings it"
    return pytest.importorskip("bitsandbytes", reason=reason)


def test_the_recipe_is_that_of_the_example():
    (recipe,) = (yaml.safe_load(block.text) for block in blocks(PAGE) if block.language == "yaml")
    assert recipe == yaml.safe_load((ROOT / "examples/train_qbone.yaml").read_text())


def test_the_page_runs_from_top_to_bottom(bitsandbytes, tmp_path, monkeypatch):
    import datasets
    from safetensors.torch import load_file

    from helpers.tiny_llama import questions, write_tiny_llama

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    write_tiny_llama(tmp_path / BASE)
    for name, count in (("train", 40), ("test", 8)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(count)))
    run = PageRun(PAGE, replaced=SMALL).run()
    assert set(run.ran) == {"python", "bash", "yaml"}

    names = run.names
    kinds = {type(module.base_layer) for _, module in bone_layers(names["model"].base_model.model)}
    assert kinds == {bitsandbytes.nn.Linear4bit}
    # What the page says: a merge into 4 bits loses what was learned.
    model, tokens = names["model"], torch.arange(2, 14).view(1, -1)
    with torch.no_grad():
        adapted = model(tokens).logits
        model.merge_adapter()
        assert (model(tokens).logits - adapted).abs().max() > 1e-3  # of what fp32 rounds a thousand times

    summary = json.loads(Path("runs/qbone/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1
    by_train, by_command = (load_file(Path(folder) / "model.safetensors") for folder in ("runs/qbone/merged", "merged"))
    assert all(same_bits(by_command[key], value, Promise.SAME_PRODUCT) for key, value in by_train.items())
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    (evaluation,) = json.loads(Path("results/merged/results.json").read_text())["evaluations"]
    assert evaluation["figures"][0]["value"] < summary["eval_loss_before"] - 0.1


def test_bytes_of_a_weight_are_those_that_bitsandbytes_keeps(bitsandbytes):
    (said,) = re.findall(r"([0-9.]+) bytes \(4 bits", (ROOT / PAGE).read_text())
    weight = torch.randn(256, 512)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    kept = [packed, state.absmax, state.state2.absmax]
    assert f"{sum(part.numel() * part.element_size() for part in kept) / weight.numel():.3f}" == said
