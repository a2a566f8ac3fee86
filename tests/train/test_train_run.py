"""Whole runs on a tiny Llama and a real ALBERT: what is learned, written, resumed and refused."""

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashbone.errors import ConfigError, FlashboneError, NonFiniteError
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import DataRecipe, Recipe
from flashbone.train.run import train
from flashbone.train.summary import peak_memory
from helpers.tiny_llama import questions, word_tokenizer, write_tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]

TIMINGS = ("train_s",)


def recipe_for(llama, file, output, **changes) -> Recipe:
    training = {"max_steps": 10, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "disable_tqdm": True}
    fields = {
        "model": str(llama),
        "data": DataRecipe(path=str(file)),
        "output": str(output),
        "adapter": {"r": 8},
        "training": {**training, **changes.pop("training", {})},
    }
    return Recipe(**{**fields, **changes})


@pytest.fixture
def questions_file(jsonl):
    return jsonl(questions(80))


def metrics_of(folder) -> list[dict]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def test_a_run_learns_and_writes_everything_it_promises(llama, questions_file, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    training = {"logging_steps": 7, "save_strategy": "no"}
    result = train(recipe_for(llama, questions_file, out, merge=True, training=training))

    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.2
    assert (summary["steps"], summary["train_rows"], summary["eval_rows"]) == (10, 72, 8)
    assert summary["tokens"] == 10 * 8 * 14  # 14 tokens a row: six, seven, and the end of text
    for figure in ("trainable_parameters", "trainable_percent", "train_s", "tokens_per_s", "peak_mib"):
        assert summary[figure] > 0
    rows = metrics_of(out)
    assert rows[0]["step"] == 0
    assert rows[0]["eval_loss"] == summary["eval_loss_before"]
    assert {"loss", "learning_rate", "tokens"} <= set(rows[1])
    assert [row["step"] for row in rows if "loss" in row][-1] == 10
    assert not list(out.glob("*.partial"))

    base = AutoModelForCausalLM.from_pretrained(llama)
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    tokens = AutoTokenizer.from_pretrained(out / "adapter")("where was the big cat ?", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits, adapted(**tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_loss_is_on_the_response_only(llama, jsonl, tmp_path):
    """Against transformers' own loss with the prompt's five tokens masked by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = jsonl([{"prompt": "where was the cat ?", "completion": " on the mat ."}] * 4)
    out = tmp_path / "run"
    summary = train(recipe_for(llama, path, out, training={"max_steps": 1}, data=DataRecipe(str(path), eval=1))).summary
    tokens = AutoTokenizer.from_pretrained(llama)("where was the cat ? on the mat .</s>", return_tensors="pt").input_ids
    labels = tokens.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(llama)(input_ids=tokens, labels=labels).loss.item()
    assert math.isclose(summary["eval_loss_before"], want, rel_tol=1e-5)


def test_conversations_are_trained_through_the_chat_template(llama, jsonl, tmp_path):
    talk = [
        {"role": "user", "content": "where was the cat ?"},
        {"role": "assistant", "content": "on the mat ."},
        {"role": "user", "content": "was it red ?"},
        {"role": "assistant", "content": "yes"},
    ]
    path = jsonl([{"messages": talk}] * 8)
    summary = train(
        recipe_for(llama, path, tmp_path / "run", data=DataRecipe(str(path), eval=2), training={"max_steps": 4})
    ).summary
    assert (summary["train_rows"], summary["eval_rows"]) == (12, 4)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_conversations_without_a_chat_template_are_refused_with_the_remedy(jsonl, tmp_path):
    model = write_tiny_llama(tmp_path / "plain", chat_template=None)
    path = jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4)
    recipe = recipe_for(model, path, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"has no chat template; give one with training\.chat_template_path"):
        train(recipe)
    assert not (tmp_path / "run").exists()
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} </s>{% endfor %}")
    recipe.training |= {"chat_template_path": str(template), "max_steps": 1}
    assert train(recipe).summary["steps"] == 1


KILLED = """
import os, sys
from pathlib import Path
import flashbone.train.callbacks as callbacks
from flashbone.cli import main
step_end = callbacks.Recorder.on_step_end
def dies_at_seven(self, args, state, control, **kwargs):
    if state.global_step == 7:
        os._exit(9)
    step_end(self, args, state, control, **kwargs)
callbacks.Recorder.on_step_end = dies_at_seven
sys.exit(main(["train", *sys.argv[1:]]))
"""


def config_file(recipe: Recipe, path: Path) -> Path:
    import dataclasses

    path.write_text(json.dumps(dataclasses.asdict(recipe)))  # JSON is YAML
    return path


def kill_at_step_seven(recipe: Recipe, folder: Path) -> None:
    config = config_file(recipe, folder / "killed.yaml")
    done = subprocess.run([sys.executable, "-c", KILLED, str(config)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 9, done.stderr
    assert RunFolder(recipe.output).last_checkpoint().name == "checkpoint-6"


def test_a_killed_run_resumes_to_the_losses_and_the_adapter_of_one_never_killed(llama, questions_file, tmp_path):
    changes = {
        "adapter": {"r": 8, "variant": "bat-row", "dropout": 0.1},
        "training": {"save_steps": 3, "logging_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    }
    straight, resumed = (recipe_for(llama, questions_file, tmp_path / name, **changes) for name in ("a", "b"))
    train(straight)
    kill_at_step_seven(resumed, tmp_path)
    result = train(resumed, resume=True)

    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    blocks = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("a", "b")]
    assert blocks[0].keys() == blocks[1].keys()
    assert all(torch.equal(blocks[0][key], blocks[1][key]) for key in blocks[0])
    assert any(block.abs().max() > 0 for block in blocks[0].values())
    assert result.summary["eval_loss_before"] is not None


def test_a_run_killed_after_its_last_step_is_finished_without_another(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "a")
    first = train(recipe).summary
    adapter = load_file(tmp_path / "a/adapter/adapter_model.safetensors")
    rows = metrics_of(tmp_path / "a")
    (tmp_path / "a/summary.json").unlink()
    again = train(recipe, resume=True).summary
    assert (again["steps"], again["eval_loss_after"]) == (10, first["eval_loss_after"])
    assert metrics_of(tmp_path / "a") == rows
    after = load_file(tmp_path / "a/adapter/adapter_model.safetensors")
    assert all(torch.equal(adapter[key], after[key]) for key in adapter)


def test_a_checkpoint_cut_short_by_the_kill_is_passed_over(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "a", training={"save_steps": 5})
    train(recipe)
    (tmp_path / "a/summary.json").unlink()
    (tmp_path / "a/checkpoint-10/trainer_state.json").write_text('{"global_st')
    assert RunFolder(recipe.output).last_checkpoint().name == "checkpoint-5"
    assert train(recipe, resume=True).summary["steps"] == 10


def test_a_finished_run_says_so_and_is_left_alone(llama, questions_file, tmp_path, caplog):
    recipe = recipe_for(llama, questions_file, tmp_path / "a")
    first = train(recipe)
    stamp = (tmp_path / "a/adapter/adapter_model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO", logger="flashbone"):
        again = train(recipe, resume=True)
    assert again.summary == first.summary
    assert "is finished; nothing to do" in caplog.text
    assert (tmp_path / "a/adapter/adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_a_finished_run_can_be_given_more_steps(llama, questions_file, tmp_path):
    train(recipe_for(llama, questions_file, tmp_path / "a"))
    longer = recipe_for(llama, questions_file, tmp_path / "a", training={"max_steps": 14})
    assert train(longer, resume=True).summary["steps"] == 14


def test_resuming_without_a_checkpoint_starts_afresh(llama, questions_file, tmp_path, caplog):
    with caplog.at_level("INFO", logger="flashbone"):
        summary = train(recipe_for(llama, questions_file, tmp_path / "a"), resume=True).summary
    assert summary["steps"] == 10
    assert "no checkpoint in" in caplog.text


def test_an_output_with_a_run_is_refused_and_left_as_it_was(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "a")
    train(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume, or choose another output"):
        train(recipe)
    other = recipe_for(llama, questions_file, tmp_path / "a", adapter={"r": 4})
    with pytest.raises(ConfigError, match=r"another recipe: adapter\.r was 8, is 4"):
        train(other, resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/folder"}, "model /no/such/folder: no such folder"),
        (
            {"model": "nobody/nothing"},
            "model nobody/nothing: no such folder, and not found in the hub's cache .offline",
        ),
        ({"model": __file__}, r"test_train_run\.py: is a file; a folder, a hub id, a \.gguf file or an RWKV"),
        ({"model": "/no/such.gguf"}, "no such GGUF file"),
        ({"adapter": {"r": 0}}, "`r` should be a positive integer value"),
        ({"adapter": {"r": 8, "target_modules": ["q_prj"]}}, "q_pr"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "training: cosin is not a valid SchedulerType"),
        ({"training": {"max_length": 3}}, r"no training row has a token of its answer within training\.max_length 3"),
    ],
)
def test_wrong_input_is_one_clear_line_and_leaves_nothing_behind(llama, questions_file, tmp_path, changes, message):
    with pytest.raises(FlashboneError, match=message) as error:
        train(recipe_for(llama, questions_file, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_of_the_output_is_refused(llama, questions_file):
    with pytest.raises(ConfigError, match="a file is in the way"):
        train(recipe_for(llama, questions_file, questions_file / "run"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # seen on a full tmpfs
    ],
)
def test_a_full_disk_is_one_clear_line_and_leaves_no_half_written_file(
    llama, questions_file, tmp_path, monkeypatch, error
):
    def full(obj, path):
        Path(path).write_bytes(b"half")
        raise error

    recipe = recipe_for(llama, questions_file, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.torch.save", full)
        with pytest.raises(FlashboneError, match="run: no space left on device; free some, then continue with") as got:
            train(recipe)
    assert "\n" not in str(got.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run/adapter").exists()
    assert train(recipe, resume=True).summary["steps"] == 10


def test_a_failed_save_of_the_adapter_leaves_no_adapter(llama, questions_file, tmp_path, monkeypatch):
    def broken(self, folder, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr("transformers.tokenization_utils_base.PreTrainedTokenizerBase.save_pretrained", broken)
    with pytest.raises(FlashboneError, match="no space left on device"):
        train(recipe_for(llama, questions_file, tmp_path / "run", training={"save_strategy": "no"}))
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith("adapter")]


def test_a_diverged_run_stops_with_the_step_and_the_remedy(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "run", training={"learning_rate": 1e30, "max_grad_norm": 0})
    with pytest.raises(NonFiniteError, match=r"step \d+: (eval_)?loss is (nan|inf); lower training.learning_rate"):
        train(recipe)


@pytest.fixture(scope="module")
def albert(tmp_path_factory) -> Path:
    """The pretrained ALBERT of rxnmapper, whose layers share their weights, with a plain tokenizer of its words."""
    from importlib.util import find_spec

    spec = find_spec("rxnmapper")
    if spec is None:
        pytest.skip("rxnmapper, which carries a small ALBERT, is not installed")
    source = Path(spec.submodule_search_locations[0]) / "models/transformers/albert_heads_8_uspto_all_1310k"
    folder = tmp_path_factory.mktemp("albert")
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).symlink_to(source / name)
    words = (source / "vocab.txt").read_text().splitlines()
    word_tokenizer(words, "[PAD]", "[CLS]", "[SEP]", "[UNK]").save_pretrained(folder)
    return folder


def test_classification_learns_saves_its_head_and_reports_accuracy_and_f1(albert, jsonl, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    groups = {"acid": "C ( = O ) O", "amine": "C N"}
    path = jsonl([{"text": "C " * (1 + i % 5) + groups[name], "label": name} for i in range(30) for name in groups])
    recipe = recipe_for(
        albert,
        path,
        tmp_path / "run",
        task="classification",
        data=DataRecipe(str(path), eval=0.2),
        training={"max_steps": 30, "learning_rate": 1e-3, "save_strategy": False},  # what YAML makes of `no`
    )
    summary = train(recipe).summary
    assert summary["labels"] == ["acid", "amine"]
    assert summary["eval_accuracy_after"] == summary["eval_macro_f1_after"] == 1.0
    assert 0 <= summary["eval_accuracy_before"] <= 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))

    base = AutoModelForSequenceClassification.from_pretrained(albert, num_labels=2)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    with torch.no_grad():
        logits = model(
            **tokenizer(["C C C C C C C ( = O ) O", "C C C C C C C N"], padding=True, return_tensors="pt")
        ).logits
    assert logits.argmax(-1).tolist() == [0, 1]


def test_peak_memory_and_rates_carry_their_units_in_their_names():
    assert set(peak_memory()) == {"peak_mib", "peak_of"}


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_record_of_an_earlier_run_is_named_with_the_remedy(content, llama, questions_file, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.json").write_text(content)
    with pytest.raises(FlashboneError, match=r"recipe.json: .*JSON.*; delete it, or choose another output"):
        train(recipe_for(llama, questions_file, out), resume=True)
    assert (out / "recipe.json").read_text() == content
