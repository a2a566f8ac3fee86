"""The page on quantised bases and its example run as they stand."""

import pytest

from flashbone.train.recipe import load_recipe
from flashbone.tuner.layers.layer import bone_layers
from helpers.adapter_folders import tiny_llama
from helpers.pages import ROOT, blocks, run_page

pytestmark = pytest.mark.beside


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; `make test-all` brings it")
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    run = run_page("docs/quantisation.md")
    assert run.ran == ["python", "yaml", "python"]
    layers = [layer for _, layer in bone_layers(run.names["model"].base_model.model)]
    assert len(layers) == 14
    assert not any(layer.merged for layer in layers)


def test_the_example_is_a_recipe():
    recipe = load_recipe(ROOT / "examples" / "train_qbone.yaml")
    assert recipe.quantization == {"bits": 4, "type": "nf4", "double": True}


def test_the_section_of_the_page_is_one_of_recipes(tmp_path):
    (section,) = [block.text for block in blocks("docs/quantisation.md") if block.language == "yaml"]
    (tmp_path / "recipe.yaml").write_text(f"model: M\noutput: o\ndata: {{path: X}}\n{section}")
    assert load_recipe(tmp_path / "recipe.yaml").quantization == {"bits": 4, "type": "nf4", "double": True}
