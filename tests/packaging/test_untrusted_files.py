"""Models, pickles, recipes and data with a trap in them, which would leave a trace if it ran: none runs unasked."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from flashbone.cli import main
from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.train.checkpoints import write_manifest
from helpers.adapter_folders import blocks_for, tiny_llama, write_adapter, write_config
from helpers.tiny_llama import questions, write_tiny_llama


class Intruder:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.fixture
def trace(tmp_path):
    """The file that a trap leaves; nothing may have left it."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists(), "the trap has run"


def write_model_with_code(folder: Path, trace: Path, model_type: str) -> Path:
    """A model whose configuration asks for classes of a file beside it, which leaves a trace when it is imported."""
    write_tiny_llama(folder)
    code = f"""
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open({str(trace)!r}, "w").close()
class TrapConfig(LlamaConfig):
    model_type = {model_type!r}
class TrapModel(LlamaForCausalLM):
    config_class = TrapConfig
class TrapTokenizer(PreTrainedTokenizerFast):
    pass
"""
    (folder / "trap.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    autos = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    config["auto_map"] = {"AutoConfig": "trap.TrapConfig", **dict.fromkeys(autos, "trap.TrapModel")}
    config["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["auto_map"] = {"AutoTokenizer": [None, "trap.TrapTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


@pytest.fixture
def modules_apart(tmp_path, monkeypatch):
    """transformers copies a model's code into a cache, from which it imports it: here, a cache of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def nobody_there(prompt=""):
        raise EOFError("nobody answers")

    monkeypatch.setattr("builtins.input", nobody_there)  # transformers asks at a terminal whether to trust


def use_model(folder: Path, way: str) -> None:
    from flashbone.evaluate.loading import load_labelled_classifier
    from flashbone.merge.verify.models import load
    from flashbone.train.models import load_causal_lm, load_classifier
    from flashbone.train.tokenizers import load_tokenizer

    if way == "language model":
        load_causal_lm(str(folder), torch.float32)
    elif way == "classifier":
        load_classifier(str(folder), torch.float32, ["a", "b"], load_tokenizer(str(write_tiny_llama(folder / "plain"))))
    elif way == "tokenizer":
        load_tokenizer(str(folder))
    elif way == "classifier of eval":
        load_labelled_classifier(str(folder), None, torch.float32, "cpu", labels=["a", "b"])
    else:
        load(folder)


@pytest.mark.parametrize("model_type", ["unheard-of", "llama"])
@pytest.mark.parametrize("way", ["language model", "classifier", "tokenizer", "classifier of eval", "merge --verify"])
def test_a_models_code_is_not_run_unasked(tmp_path, trace, modules_apart, way, model_type):
    folder = write_model_with_code(tmp_path / "model", trace, model_type)
    with contextlib.suppress(FlashboneError):
        use_model(folder, way)
        assert model_type == "llama" or way == "tokenizer", "nothing but its code knows this model"


def test_the_same_model_runs_its_code_where_the_recipe_trusts_it(tmp_path, modules_apart):
    from flashbone.train.arguments import trainer_arguments
    from flashbone.train.models import load_causal_lm
    from flashbone.train.recipe import DataRecipe, Recipe

    trace = tmp_path / "trace"
    folder = write_model_with_code(tmp_path / "model", trace, "unheard-of")
    recipe = Recipe(str(folder), DataRecipe("rows.jsonl"), str(tmp_path / "out"), training={"use_cpu": True})
    assert trainer_arguments(recipe).trust_remote_code is False
    assert trainer_arguments(recipe).report_to == []
    load_causal_lm(str(folder), torch.float32, trust_remote_code=True)
    assert trace.exists()


@pytest.mark.parametrize(("model_type", "code"), [("unheard-of", 1), ("llama", 0)])
def test_inspect_never_runs_a_models_code(tmp_path, trace, modules_apart, capsys, model_type, code):
    folder = write_model_with_code(tmp_path / "model", trace, model_type)
    assert main(["inspect", str(folder), "--adapter.r", "4"]) == code
    assert ("which is never run here" in capsys.readouterr().err) == (code == 1)


def test_a_merge_copies_a_models_code_and_does_not_run_it(tmp_path, trace, capsys):
    folder = write_model_with_code(tmp_path / "model", trace, "unheard-of")
    blocks = {"model.layers.0.self_attn.q_proj": torch.randn(4, 32)}
    write_adapter(tmp_path / "adapter", "bone", blocks)
    assert main(["merge", str(folder), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/trap.py").is_file()


def test_the_intruder_leaves_its_trace_where_a_pickle_is_trusted(tmp_path):
    pickle.loads(pickle.dumps(Intruder(tmp_path / "trace"))).close()
    assert (tmp_path / "trace").exists()


def test_peft_runs_no_code_in_a_pickled_adapter(tmp_path, trace):
    write_config(tmp_path, r=4, target_modules=["q_proj"])
    torch.save({"base_model.model.q_proj.bone_block": Intruder(trace)}, tmp_path / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A recipe, and the output of its run as it was after the first of two steps."""
    import datasets

    from flashbone.train.recipe import DataRecipe, Recipe
    from flashbone.train.run import train

    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(16)))
    training = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    recipe = Recipe(
        str(write_tiny_llama(folder / "model")),
        DataRecipe(str(folder / "rows.jsonl"), eval=None),
        str(folder / "out"),
        adapter={"r": 4},
        training=training,
    )
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "datasets"
    datasets.disable_progress_bars()
    train(recipe)
    (folder / "out/summary.json").unlink()
    shutil.rmtree(folder / "out/adapter")
    shutil.rmtree(folder / "out/checkpoint-2")
    yield recipe
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.parametrize("file", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_runs_no_code_in_a_checkpoint(tmp_path, trace, stopped_run, file):
    from flashbone.train.run import train

    out = tmp_path / "out"
    shutil.copytree(stopped_run.output, out)
    assert (out / "checkpoint-1" / file).is_file()
    torch.save({"planted": Intruder(trace)}, out / "checkpoint-1" / file)
    write_manifest(out / "checkpoint-1")  # as who plants a file can, too
    recipe = dataclasses.replace(stopped_run, output=str(out))
    if file == "training_args.bin":  # written by transformers, read by nobody
        assert train(recipe, resume=True).summary["steps"] == 2
    else:
        with pytest.raises(pickle.UnpicklingError):
            train(recipe, resume=True)


@pytest.mark.parametrize("place", ["file", "command line"])
def test_tags_of_python_in_yaml_are_refused(tmp_path, trace, capsys, place):
    tag = f"!!python/object/apply:builtins.open ['{trace}', 'w']"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"adapter:\n  r: {tag}\n" if place == "file" else "adapter:\n  r: 4\n")
    tiny_llama().config.save_pretrained(tmp_path / "model")
    words = [] if place == "file" else ["--adapter.r", tag]
    assert main(["inspect", str(tmp_path / "model"), "--config", str(recipe), *words]) == 1
    assert "error" in capsys.readouterr().err


def test_a_datasets_script_is_not_run(tmp_path, trace):
    from flashbone.train.data.loading import load_data
    from flashbone.train.recipe import DataRecipe, Recipe

    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="scripts are never run"):
        load_data(Recipe("model", DataRecipe(str(folder)), str(tmp_path / "out")))


def test_a_vocabulary_holds_literals_only(tmp_path, trace):
    from flashbone.rwkv.vocabulary import read_vocabulary

    file = tmp_path / "vocabulary.txt"
    file.write_text(f"1 open({str(trace)!r},'w') 1\n")
    with pytest.raises(FormatError, match="is not a literal"):
        read_vocabulary(file)


WITHOUT_NETWORK = """
import socket
asked = []
def refuse(*args, **kwargs):
    asked.append((words[0], args))
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = refuse
class Socket(socket.socket):
    connect = connect_ex = refuse
socket.socket = Socket
from flashbone.cli import main
for words in {commands!r}:
    assert main(words) == 0, words
assert not asked, asked
"""


@pytest.fixture(scope="module")
def local_files(tmp_path_factory) -> Path:
    """A model, an adapter of it, rows and a recipe."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("local")
    model = AutoModelForCausalLM.from_pretrained(write_tiny_llama(folder / "model"))
    write_adapter(folder / "adapter", "bone", blocks_for(model, "bone", ("q_proj",), 4), target_modules=["q_proj"])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(16)))
    training = {"max_steps": 1, "use_cpu": True, "save_strategy": "no"}
    recipe = {"model": "model", "output": "run", "data": {"path": "rows.jsonl"}, "adapter": {"r": 4}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"training": training}))
    return folder


LOCAL = [
    ["inspect", "./model", "--json"],
    ["inspect", "adapter", "--json"],
    ["merge", "model", "adapter", "merged", "--verify"],
    ["convert", "adapter", "lora", "--to", "lora", "--base", "model"],
    ["eval", "./model", "--adapter", "adapter", "--perplexity", "rows.jsonl", "--device", "cpu"],
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commands", "settings"),
    [(LOCAL, {}), ([["train", "recipe.yaml"]], {"HF_HUB_DISABLE_TELEMETRY": "1"})],
    ids=["all others", "train without TRL's telemetry"],
)
def test_local_files_ask_nothing_of_the_network(local_files, commands, settings):
    online = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    own = {"HF_HOME": str(local_files / "home"), "OMP_NUM_THREADS": "1", **settings}
    run = [sys.executable, "-c", WITHOUT_NETWORK.format(commands=commands)]
    done = subprocess.run(run, cwd=local_files, env=online | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
