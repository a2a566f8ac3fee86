"""Guides that need little preparation: each runs from top to bottom, and what it says of the outcome is so."""

import importlib.util
import json
from contextlib import nullcontext

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flashbone.conversion.engines import ENGINES
from flashbone.errors import BackendError
from flashbone.train.recipe import load_recipe
from helpers.ledger import is_runnable
from helpers.pages import ROOT, Block, PageRun, blocks, run_page
from helpers.stand_ins import SMOLLM2, link_examples, write_llama_and_adapters
from helpers.tiny_llama import tiny_tokenizer, write_tiny_llama


@pytest.mark.slow
def test_adapters(place):
    names = run_page("docs/adapters.md").names
    assert type(names["merged"][0]) is torch.nn.Linear
    assert names["config"].lora_alpha == names["config"].r
    assert load_file("my-lora/adapter_model.safetensors").keys() == names["state"].keys()


def test_the_error_that_adapters_shows_is_the_one_that_comes():
    import peft

    from flashbone import BoneConfig

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleDict({"3": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(576, 576)})})

    states = []
    for r in (32, 64):
        model = peft.get_peft_model(Layers(), BoneConfig(r=r, target_modules=["q_proj"]))
        states.append(peft.get_peft_model_state_dict(model))
    with pytest.raises(Exception, match="does not fit") as caught:
        peft.set_peft_model_state_dict(model, states[0])
    (shown,) = [block.text for block in blocks("docs/adapters.md") if block.language == "text"]
    assert " ".join(str(caught.value).split()) == " ".join(shown.split())


@pytest.mark.slow
def test_layers(place):
    names = run_page("docs/layers.md").names
    assert names["merged"].model.layers[0].mlp.experts.gate_up_proj.shape[0] == 4


@pytest.mark.slow
def test_merging(place):
    write_llama_and_adapters(one={}, two={"variant": "bat-row"})
    names = run_page("docs/merging.md").names
    merged, base = (load_file(f"{name}/model.safetensors") for name in ("merged", "base"))
    assert json.loads((place / "merged" / "merge.json").read_text())["adapters"][0]["weight"] == 0.7
    far = {key for key in base if not torch.allclose(base[key], merged[key], atol=1e-3)}
    assert len(far) == 14
    assert names["report"].merged == 14


@pytest.mark.slow
def test_converting(place, capsys):
    write_llama_and_adapters(my_adapter={}, my_bat={"variant": "bat-col"})
    names = run_page("docs/converting.md").names
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in said if line.startswith(("my-lora: ", "served: "))] == ["exact"] * 2
    assert json.loads((place / "near-lora" / "adapter_config.json").read_text())["r"] <= 32
    assert json.loads((place / "lora-of-64" / "adapter_config.json").read_text())["r"] == 64
    assert json.loads((place / "served" / "adapter_config.json").read_text())["r"] in ENGINES["vllm"].ranks
    assert f"vllm serve {place / 'base'} --enable-lora" in (place / "served" / "SERVE.md").read_text()
    assert (names["report"].variant, names["report"].modules, names["report"].exact) == ("bone", 14, True)


@pytest.mark.slow
def test_training(place):
    write_tiny_llama(place / SMOLLM2)
    names = run_page("docs/training.md").names
    assert json.loads((place / "runs/mine/summary.json").read_text())["steps"] == 2
    tokenizer = tiny_tokenizer()
    names["tokenise"](["the cat sat", "yes"], tokenizer, "ids.jsonl")
    rows = [json.loads(line) for line in (place / "ids.jsonl").read_text().splitlines()]
    assert rows[0]["input_ids"] == [*tokenizer("the cat sat")["input_ids"], tokenizer.eos_token_id]
    assert len(rows) == 2
    (snippet,) = [block.text for block in blocks("docs/training.md") if block.text.startswith("training: {max_length")]
    recipe = {"model": "M", "output": "o", "data": {"path": "data"}} | yaml.safe_load(snippet)
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert load_recipe(place / "recipe.yaml").training["packing_strategy"] == "wrapped"
    trainer = orthogonal_trainer()
    assert names["watch"](trainer) is trainer.callback_handler.callbacks[0]


def orthogonal_trainer():
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from flashbone import BoneConfig

    config = BoneConfig(bottleneck_size=4, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
    return Trainer(model, TrainingArguments("run", report_to=[], use_cpu=True))


def accelerate(words: list[str]) -> None:
    """What `accelerate launch` would start: a configuration that is here, and our command with a recipe that is."""
    from accelerate.commands.launch import launch_command_parser

    assert words[1] == "launch"
    given = launch_command_parser().parse_args(words[2:])
    config = yaml.safe_load((ROOT / given.config_file).read_text())
    assert (config["distributed_type"], config["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
    assert given.module
    assert (given.training_script, given.training_script_args[0]) == ("flashbone", "train")
    recipe = load_recipe(given.training_script_args[1], given.training_script_args[2:])
    assert not recipe.merge  # which is refused under FSDP


@pytest.mark.slow
def test_distributed(place):
    link_examples(place)
    assert run_page("docs/distributed.md", elsewhere={"accelerate": accelerate}).commands == ["accelerate"]


class Refused(PageRun):
    """Where triton is not installed, the backend that the page asks for by name is refused, as the page says."""

    def python(self, block: Block) -> None:
        there = importlib.util.find_spec("triton") is not None
        with nullcontext() if there else pytest.raises(BackendError, match="triton"):
            super().python(block)


@pytest.mark.slow
def test_triton():
    from peft import get_peft_model

    from flashbone import BoneConfig

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), BoneConfig(r=4, target_modules=["0"]))
    Refused("docs/triton.md", names={"model": model}).run()


def benchmark(words: list[str]) -> None:
    """`python -m benchmarks`: the tables are compared; of the rest, which takes hours, the options are read."""
    from benchmarks.__main__ import main
    from benchmarks.options import SPECS, parser

    assert words[1:3] == ["-m", "benchmarks"]
    if words[3:] == ["tables"]:
        assert main(["tables", "--check"]) == 0
        return
    given = parser().parse_args(words[3:])
    if given.benchmark in SPECS:
        assert given.part in (*SPECS[given.benchmark].parts, "all")


@pytest.mark.slow
def test_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    from benchmarks.options import SPECS

    run_page("docs/benchmarks.md", elsewhere={"python": benchmark})
    (lines,) = [block.text.splitlines() for block in blocks("docs/benchmarks.md") if block.language == "bash"]
    assert all(is_runnable(line) for line in lines)
    assert lines[1].rpartition("# one: ")[2].split(", ") == list(SPECS)
