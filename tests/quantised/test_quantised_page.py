"""The page on quantised bases and its example run as they stand."""

import re
from pathlib import Path

import pytest

from flashbone.train.recipe import load_recipe
from helpers.adapter_folders import tiny_llama

ROOT = Path(__file__).parent.parent.parent


def test_the_python_of_the_page_runs(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; `make test-quantised` runs this with it")
    tiny_llama().save_pretrained(tmp_path)
    names = {"folder": tmp_path}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quantisation.md").read_text(), re.S)
    for block in blocks:
        exec(compile(block, "docs/quantisation.md", "exec"), names)
    assert len(blocks) == 2
    layers = [layer for _, layer in names["model"].base_model._bone_layers()]
    assert len(layers) == 14
    assert not any(layer.merged for layer in layers)


def test_the_example_is_a_recipe():
    recipe = load_recipe(ROOT / "examples" / "train_qbone.yaml")
    assert recipe.quantization == {"bits": 4, "type": "nf4", "double": True}
