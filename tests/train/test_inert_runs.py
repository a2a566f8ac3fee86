"""Runs whose host computes past an adapter: `flashbone train` stops in one line, `flashbone eval` names the layers."""

import json
import subprocess
import sys

import pytest
from peft import BoneConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from training_runs import config_file, metrics_of, recipe_for
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from flashbone import cli
from flashbone.train.run import train
from flashbone.tuner.model.acting import InertAdapterWarning
from helpers.mlp import fill_blocks

LAYERS = "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
REMEDY = "so that these adapters do nothing; put such layers into exclude_modules"


def hidden(mlp, x):
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


def past(mlp, x):
    weight = next(p for name, p in mlp.down_proj.named_parameters() if name.endswith("weight"))
    return F.linear(hidden(mlp, x), weight)


def detached(mlp, x):
    return mlp.down_proj(hidden(mlp, x)).detach()


def read(mlp, x):  # passed on, so that no source shows it
    return _product(hidden(mlp, x), mlp.down_proj)


def _product(x, layer):
    return F.linear(x, layer.weight)


PAST = f"the model computes with the weights of these layers without calling them, past their adapters, {REMEDY}"


@pytest.mark.parametrize("held_out", [None, 0.1])
def test_a_run_stops_in_one_line_that_names_layers_and_remedy(
    held_out, llama, questions_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(LlamaMLP, "forward", past)
    recipe = recipe_for(llama, questions_file, tmp_path / "run", adapter={"r": 4, "target_modules": ["down_proj"]})
    recipe.data.eval = held_out
    assert cli.main(["train", str(config_file(recipe, tmp_path / "c.yaml"))]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"flashbone train: error: {LAYERS}: {PAST}"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_names_layers_whose_output_is_detached_and_learns_the_others(
    llama, questions_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(LlamaMLP, "forward", detached)
    targets = ["down_proj", "q_proj"]
    recipe = recipe_for(llama, questions_file, tmp_path / "run", adapter={"r": 4, "target_modules": targets})
    with pytest.warns(InertAdapterWarning, match="no gradient came back to what they returned") as seen:
        train(recipe)
    [said] = [str(warning.message) for warning in seen if warning.category is InertAdapterWarning]
    assert said.startswith(LAYERS)
    blocks = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name, block in blocks.items() if block.any()} == {"q_proj"}
    assert {name.split(".")[-2] for name in blocks} == set(targets)


@pytest.mark.slow
def test_the_run_goes_on_without_those_layers_and_with_a_read_that_no_source_shows(
    llama, questions_file, tmp_path, capsys, monkeypatch
):
    for forward, fields in ((past, {"exclude_modules": ["down_proj"]}), (read, {})):
        monkeypatch.setattr(LlamaMLP, "forward", forward)
        adapter = {"r": 4, "target_modules": "all-linear", **fields}
        output = tmp_path / forward.__name__
        recipe = recipe_for(llama, questions_file, output, adapter=adapter, training={"max_steps": 3})
        assert cli.main(["train", str(config_file(recipe, tmp_path / "c.yaml"))]) == 0, capsys.readouterr().err
        assert len([row for row in metrics_of(output) if "loss" in row]) == 3


COMMAND = """
import sys
from transformers.models.llama.modeling_llama import LlamaMLP
from torch.nn import functional as F
def past(self, x):
    weight = next(p for name, p in self.down_proj.named_parameters() if name.endswith("weight"))
    return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), weight)
LlamaMLP.forward = past
from flashbone.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_evaluation_names_the_layers_in_one_line_and_goes_on(llama, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama),
        BoneConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM"),
    )
    fill_blocks(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("the cat sat on the mat .\n" * 5)
    args = [
        "eval",
        str(llama),
        "--adapter",
        str(tmp_path / "adapter"),
        "--perplexity",
        str(tmp_path / "text.txt"),
        "--json",
    ]
    done = subprocess.run([sys.executable, "-c", COMMAND, *args], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    named = [line for line in done.stderr.splitlines() if "past their adapters" in line]
    assert len(named) == 1
    assert named[0].startswith(f"flashbone: {LAYERS}: the model computes with")
