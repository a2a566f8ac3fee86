"""`flashbone inspect` on the command line."""

import contextlib
import json
import subprocess
import sys
import types

import pytest
import torch
from peft import get_peft_model

from flashbone import BoneConfig
from flashbone.cli import main
from flashbone.inspect.writing import percent
from flashbone.train.models import load_causal_lm, load_classifier
from helpers.adapter_folders import tiny_bert, tiny_llama, write_adapter


@pytest.fixture
def base(tmp_path):
    """A model's folder without its weights."""
    model = tiny_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return str(write_adapter(tmp_path / "adapter", "bone", {f"layers.{n}.q": torch.randn(4, 8) for n in range(3)}))


def _out(capsys, *args) -> str:
    assert main(["inspect", *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture(params=[80, 120])
def columns(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_the_tables_of_a_model_say_what_its_json_says(base, capsys, columns):
    command = (base, "--adapter.r", "4", "--adapter.target_modules", "[q_proj, down_proj]", "--tokens", "100")
    text = _out(capsys, *command)
    report = json.loads(_out(capsys, *command, "--json"))
    for costs in (report["costs"], report["lora"]):
        assert f"{costs['trainable_parameters']:,} ({percent(costs['percent_of_base'])})" in text
        assert f"{costs['file_bytes']:,}" in text
        assert f"+{percent(costs['percent_of_linears'])}" in text
    assert "LlamaForCausalLM, 7,860 parameters" in text
    assert "Adapter: bone, block size 4\n" in text
    assert "model.layers.{0..1}.self_attn.q_proj x 2" in text
    assert f"LoRA, rank {report['lora']['r']}" in text
    assert "for 100 tokens a step" in " ".join(text.split())
    assert [group["modules"] for group in report["layers"]] == [
        "model.layers.{0..1}.self_attn.q_proj",
        "model.layers.{0..1}.mlp.down_proj",
    ]


def test_the_tables_of_an_adapter_say_what_its_json_says(adapter, capsys, columns):
    text = _out(capsys, adapter)
    report = json.loads(_out(capsys, adapter, "--json"))
    assert f"{report['file_bytes']:,} bytes on disk" in " ".join(text.split())
    assert "layers.{0..2}.q x 3" in text
    assert "BONE, variant bone" in text
    assert "Every value is finite." in text
    assert [engine["verdict"] for engine in report["engines"]] == ["exact"] * 3 + [
        "no",
        "exact",
        "no",
    ]  # no q in SGLang, TGI
    assert "`flashbone convert ADAPTER OUT --to lora --base BASE`. Merged" in " ".join(text.split())


def test_no_line_is_wider_than_the_terminal(base, adapter, capsys, columns):
    for target in (base, adapter):
        lines = _out(capsys, target, *(["--adapter.bottleneck_size", "8"] if target == base else [])).splitlines()
        assert all(len(line) <= columns for line in lines[2:])  # the first two may hold a path of any length


def test_a_recipe_says_which_adapter(base, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("adapter: {variant: bat-row, r: 5}\ntraining: {max_steps: 1}\n")
    report = json.loads(_out(capsys, base, "--config", str(recipe), "--json"))
    assert (report["costs"]["method"], report["costs"]["r"]) == ("bat-row", 5)
    report = json.loads(_out(capsys, base, "--config", str(recipe), "--adapter.r=2", "--json"))
    assert (report["costs"]["method"], report["costs"]["r"]) == ("bat-row", 2)
    recipe.write_text("model: x\n")
    report = json.loads(_out(capsys, base, "--config", str(recipe), "--json"))
    assert (report["costs"]["method"], report["costs"]["r"]) == ("bone", 64)  # what train would do with it


@pytest.mark.parametrize("words", [["--adapter", "{variant: bat-row, r: 5}"], ["--adapter={variant: bat-row, r: 5}"]])
def test_the_fields_can_be_given_as_one_mapping(base, capsys, words):
    costs = json.loads(_out(capsys, base, *words, "--json"))["costs"]
    assert (costs["method"], costs["r"]) == ("bat-row", 5)


@pytest.mark.parametrize("task", ["classification", "sft"])
def test_the_task_of_a_recipe_decides_the_head_as_training_does(tmp_path, capsys, task):
    make = {"classification": tiny_llama, "sft": tiny_bert}[task]  # each named by its config as the other's class
    make().save_pretrained(tmp_path / "base")
    if task == "classification":
        tokenizer = types.SimpleNamespace(pad_token_id=0)
        model, task_type = load_classifier(str(tmp_path / "base"), torch.float32, ["a", "b"], tokenizer), "SEQ_CLS"
    else:
        model, task_type = load_causal_lm(str(tmp_path / "base"), torch.float32), "CAUSAL_LM"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: {task}\nadapter: {{r: 4}}\n")
    command = (str(tmp_path / "base"), "--config", str(recipe))
    capsys.readouterr()
    report = json.loads(_out(capsys, *command, "--json"))
    assert report["architecture"] == type(model).__name__
    assert report["parameters"] == model.num_parameters()
    is_new = pytest.warns(UserWarning, match="has no cls.predictions") if task == "sft" else contextlib.nullcontext()
    with is_new:
        adapted = get_peft_model(model, BoneConfig(r=4, target_modules="all-linear", task_type=task_type))
    assert report["costs"]["trainable_parameters"] == adapted.get_nb_trainable_parameters()[0]
    assert report["labels"] == (2 if task == "classification" else None)
    said = "head has the config's 2 labels" in " ".join(_out(capsys, *command).split())
    assert said == (task == "classification")


def test_a_config_file_is_a_model(base, capsys):
    assert json.loads(_out(capsys, f"{base}/config.json", "--adapter.r=4", "--json"))["parameters"] == 7860


def test_the_dtype_is_that_of_the_base(base, capsys):
    reports = [
        json.loads(_out(capsys, base, "--adapter.r=4", "--dtype", name, "--json")) for name in ("float32", "float16")
    ]
    assert [report["base_bytes"] for report in reports] == [4 * 7860, 2 * 7860]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder that the hub's cache has for somebody/tuned."""
    repository = tmp_path / "models--somebody--tuned"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / ("0" * 40)


def test_an_adapter_in_the_hubs_cache_is_an_adapter(cached, capsys):
    write_adapter(cached, "bat-row", {"q": torch.randn(2, 4, 4)})
    assert json.loads(_out(capsys, "somebody/tuned", "--json"))["variant"] == "bat-row"


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_with_the_configs_of_both_the_weights_of_an_adapter_decide(cached, capsys, where):
    target = "somebody/tuned" if where == "hub" else str(cached)
    write_adapter(cached, "bat-row", {"q": torch.randn(2, 4, 4)})
    tiny_llama().config.save_pretrained(cached)
    assert json.loads(_out(capsys, target, "--json"))["variant"] == "bat-row"
    (cached / "adapter_model.safetensors").unlink()
    assert json.loads(_out(capsys, target, "--adapter.r=4", "--json"))["parameters"] == 7860


def test_an_adapters_config_is_the_adapter(adapter, capsys):
    assert json.loads(_out(capsys, f"{adapter}/adapter_config.json", "--json"))["variant"] == "bone"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone/deep/below"], "gone/deep/below: no such folder or file"),
        (["somebody/not-here"], "somebody/not-here: no such folder, and not found in the hub's cache"),
        (["BASE", "--adapter.rr", "4"], "unknown field: adapter.rr (did you mean adapter.r or"),
        (["BASE", "--adapter", "{r: 4, rr: 4}"], "unknown field: adapter.rr (did you mean adapter.r or"),
        (["BASE", "--adapter", "7"], "adapter"),
        (["BASE", "--adapter.task_type", "X"], "adapter.task_type (set `task` instead)"),
        (["BASE", "--adapter.r", "4", "--adapter.target_modules", "[nope]"], "nope"),
        (["BASE", "--config", "gone.yaml"], "gone.yaml: no such configuration file"),
        (
            ["BASE", "--config", "TASK"],
            "task: got 'clasify', wanted one of sft, dpo, kto, reward, grpo, classification",
        ),
        (["ADAPTER", "--adapter.r", "4"], "is an adapter; --config and --adapter.* are for models"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(base, adapter, capsys, args, message, tmp_path):
    (tmp_path / "task.yaml").write_text("task: clasify\n")
    args = [{"BASE": base, "ADAPTER": adapter, "TASK": str(tmp_path / "task.yaml")}.get(arg, arg) for arg in args]
    assert main(["inspect", *args]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("flashbone inspect: error: ")
    assert message in captured.err


@pytest.mark.parametrize(
    ("args", "got"),
    [(["--adapter.r", "--json"], "--json"), (["--adapter.r"], "nothing"), (["--adapter", "--tokens=3"], "--tokens=3")],
)
def test_a_field_without_its_value_is_named(capsys, args, got):
    assert main(["inspect", "a", *args]) == 2
    assert f"{args[0]}: wanted a value, got {got}" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["a", "b"], ["a", "--unknown"], ["a", "--tokens", "0"], ["a", "--dtype", "int8"]])
def test_a_wrong_command_line_is_exit_code_2(capsys, args):
    assert main(["inspect", *args]) == 2
    assert "usage: flashbone inspect" in capsys.readouterr().err


def test_its_help_imports_no_heavy_library():
    check = "import sys, flashbone.cli; flashbone.cli.main(['inspect', '--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert "usage: flashbone inspect" in done.stdout
    assert not {"torch", "transformers", "peft", "rich"} & set(done.stderr.split())


@pytest.mark.slow
def test_it_works_without_the_packages_of_training(base):
    code = (
        "import sys\n"
        "for name in ('trl', 'datasets', 'matplotlib'): sys.modules[name] = None\n"
        "from flashbone.cli import main\n"
        f"sys.exit(main(['inspect', {base!r}, '--adapter.r', '4', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["costs"]["r"] == 4
