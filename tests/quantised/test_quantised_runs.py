"""`flashbone train` with a quantised base: recipes, runs, resuming, and what is merged."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from flashbone.errors import ConfigError
from flashbone.train.recipe import DataRecipe, Recipe, load_recipe
from helpers.comparison import Promise, same_bits

MINIMAL = "model: m\noutput: o\ndata: {path: d}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "want"),
    [
        ("quantization: {bits: 4, type: nf4, double: true}", [], {"bits": 4, "type": "nf4", "double": True}),
        ("quantization: {bits: 8}", [], {"bits": 8}),
        ("", ["--quantization.bits", "4", "--quantization.type", "fp4"], {"bits": 4, "type": "fp4"}),
        ("quantization:", [], {}),
        ("", [], {}),
    ],
)
def test_a_recipe_says_how_the_base_is_quantised(tmp_path, text, overrides, want):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL + text)
    assert load_recipe(path, overrides).quantization == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantization: {bits: 3}", "quantization.bits: got 3, wanted 4 or 8"),
        ("quantization: {bits: true}", "quantization.bits: got True, wanted 4 or 8"),
        ("quantization: {bits: 8, type: nf4}", "type and double are for 4 bits"),
        ("quantization: {bits: 8, double: true}", "type and double are for 4 bits"),
        ("quantization: {type: int4}", "quantization.type: got 'int4', wanted nf4 or fp4"),
        ("quantization: {bits: 4, double: twice}", "quantization.double: got 'twice', wanted true or false"),
        ("quantization: {bit: 4}", r"unknown field: quantization.bit \(did you mean quantization.bits"),
        ("quantization: 4", "quantization: got 4, wanted an object"),
    ],
)
def test_nonsense_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL + text)
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def recipe(tmp_path):
    """Of a run on a tiny Llama, in a folder of its own."""
    from helpers.tiny_llama import questions, write_tiny_llama

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    model = write_tiny_llama(tmp_path / "llama")
    training = {"max_steps": 8, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "disable_tqdm": True}

    def recipe(output="run", **changes) -> Recipe:
        fields = {"model": str(model), "data": DataRecipe(path=str(rows)), "output": str(tmp_path / output)}
        fields |= {"quantization": {"bits": 4, "double": True}, "adapter": {"r": 8, "variant": "bat-col"}}
        fields |= {"training": training | changes.pop("training", {}), "samples": 0}
        return Recipe(**{**fields, **changes})

    return recipe


def test_without_the_package_the_remedy_is_named(recipe, monkeypatch, tmp_path):
    from flashbone.train import models, run

    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed; pip install flashbone\[quant\]"):
        run.train(recipe())
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_run_from_before_there_was_quantisation_is_resumed(recipe, tmp_path):
    from flashbone.train import folder
    from flashbone.train.inputs import Inputs

    plain = recipe(quantization={})
    folder.claim(plain, resume=False)
    folder.record(plain, Inputs("", None, "", "", 1, 8, 1))
    path = tmp_path / "run" / "recipe.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "quantization"}))
    folder.claim(plain, resume=True)
    with pytest.raises(ConfigError, match=r"quantization\.bits was None, is 8"):
        folder.claim(recipe(quantization={"bits": 8}), resume=True)


needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; `make test-all` brings it",
)


@pytest.mark.beside
@needs_bnb
@pytest.mark.parametrize("quantization", [{"bits": 4}, {"bits": 8}, {}], ids=["4", "8", "packed"])
def test_a_dry_run_counts_a_quantised_base_as_the_run_does(recipe, quantization, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from flashbone.cli import main
    from flashbone.train.run import train

    made = recipe(quantization=quantization, training={"max_steps": 1}, samples=0)
    if not quantization:  # the numbers on disk are packed
        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(made.model, quantization_config=packed)
        model.save_pretrained(made.model)
        capsys.readouterr()
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(dataclasses.asdict(made)))
    assert main(["train", str(config), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    parameters = json.loads(out)["parameters"]
    memory = parameters.pop("memory")
    assert memory["weight_bytes"] == 4 * parameters["trainable_parameters"]
    assert not [words for words in ("Loading weights", "CONVERSION", "Traceback") if words in err]
    summary = train(made).summary
    assert {name: summary[name] for name in parameters} == parameters
    assert main(["train", str(config), "--dry-run"]) == 0
    assert "counted as if it were not quantised" in " ".join(capsys.readouterr().out.split())


@pytest.mark.beside
@needs_bnb
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("quantization", [{"bits": 4, "type": "nf4", "double": True}, {"bits": 8}], ids=["4", "8"])
def test_a_quantised_run_learns_and_merges_into_the_weights_on_disk(recipe, quantization, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from flashbone.train.run import train

    chosen = recipe(quantization=quantization, merge=True, training={"save_strategy": "no"})
    summary = train(chosen).summary
    out = tmp_path / "run"
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.2
    assert json.loads((out / "recipe.json").read_text())["quantization"] == quantization

    base = AutoModelForCausalLM.from_pretrained(chosen.model)
    assert "quantization_config" not in json.loads((out / "merged" / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    plain = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    want = dict(plain.named_parameters())
    assert all(same_bits(p, want[name], Promise.SAME_PRODUCT) for name, p in merged.named_parameters())
    assert {t.dtype for t in load_file(out / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


@pytest.mark.beside
@needs_bnb
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_quantised_run_resumes_to_the_same_losses_and_only_with_the_same_quantisation(recipe, tmp_path):
    from flashbone.train.run import train

    def losses(folder):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    often = {"logging_steps": 1, "save_steps": 4, "save_total_limit": 3}
    often["lr_scheduler_type"] = "constant"
    train(recipe("cut", training={**often, "max_steps": 4}))
    with pytest.raises(ConfigError, match=r"quantization.*bits.*8"):
        train(recipe("cut", quantization={"bits": 8}, training=often), resume=True)
    train(recipe("whole", training=often))
    train(recipe("cut", training=often), resume=True)
    assert losses("cut") == losses("whole")
    assert len(losses("cut")) == 8


@pytest.mark.beside
@needs_bnb
def test_a_gguf_file_is_not_quantised_again(recipe, tmp_path):
    from flashbone.train.models import quantized_loading

    with pytest.raises(ConfigError, match="dequantised on loading"):
        quantized_loading(recipe(model="model.gguf"), torch.float32)
