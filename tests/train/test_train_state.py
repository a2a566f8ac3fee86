"""A resumed run reads what it read before: rows, tokenizer, base, adapter, batch."""

import shutil
from dataclasses import replace

import pytest
from datasets import Dataset
from training_runs import flip, kill_at_step_seven, recipe_for

from flashbone.errors import ConfigError
from flashbone.files.outputs import LOCK
from flashbone.train.inputs import Inputs, _base_files, _hash, _rows, _tokenizer, check_same
from flashbone.train.run import train
from helpers.tiny_llama import tiny_tokenizer, write_tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]


INPUTS = Inputs("rows", "held out", "tokenizer", "base", processes=2, batch=4, accumulated=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "x"}, r"the training rows \(their order or content\)"),
        ({"held_out": None}, "the held-out rows"),
        ({"tokenizer": "x", "base": "y"}, r"the tokenizer \(.*\); the model's files"),
        (
            {"batch": 8},
            "16 rows a step .*is 32 rows a step .*_batch_size 8 and .*_accumulation_steps 1 give",
        ),
        ({"processes": 1}, "2 processes, .*is 8 rows.*1 process, .*_batch_size 4 and .*_accumulation_steps 4 give"),
        ({"processes": 3}, "; 2 processes give the same order"),
        ({"batch": 3}, "_batch_size 4 and .*_accumulation_steps 2 give"),
        ({"processes": 16, "accumulated": 1}, "_batch_size 1 and .*_accumulation_steps 1 give"),
    ],
)
def test_what_a_run_reads_may_not_change(tmp_path, changes, message):
    check_same(INPUTS, replace(INPUTS, processes=1, batch=2, accumulated=8), tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        check_same(INPUTS, replace(INPUTS, **changes), tmp_path)
    assert "\n" not in str(error.value)


def test_rows_are_told_apart_by_order_and_content():
    rows = [{"prompt": "a", "n": 1, "input_ids": [1, 2]}, {"prompt": "b", "n": None, "input_ids": [3]}]
    variants = [
        rows,
        rows[::-1],
        [{**rows[0], "n": 2}, rows[1]],
        [{**rows[0], "input_ids": [1]}, {**rows[1], "input_ids": [2, 3]}],
    ]
    hashes = [_rows(Dataset.from_list(variant)) for variant in variants]
    assert len(set(hashes)) == len(variants)
    assert hashes[0] == _rows(Dataset.from_list(rows[::-1]).select([1, 0])) == _rows(Dataset.from_list(rows))
    assert _rows(Dataset.from_list(rows).to_iterable_dataset()) != _rows(
        Dataset.from_list(rows[:1]).to_iterable_dataset()
    )


def test_tokenizers_are_told_apart_by_template_tokens_and_words():
    before = _tokenizer(tiny_tokenizer())
    used = tiny_tokenizer()
    used(["the cat", "a"], padding=True, truncation=True, max_length=3)
    assert _tokenizer(used) == before
    for change in (
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: tokenizer.add_tokens(["quokka"]),
        lambda tokenizer: setattr(tokenizer, "eos_token", "the"),
    ):
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        assert _tokenizer(tokenizer) != before


@pytest.mark.parametrize("whole", [2**26, 1000])
def test_bases_are_told_apart_by_the_content_of_their_files(tmp_path, monkeypatch, whole):
    monkeypatch.setattr("flashbone.train.inputs.WHOLE", whole)  # also as files too large to be read whole
    recipe = recipe_for(write_tiny_llama(tmp_path / "m"), "q", tmp_path / "out")
    before = _hash(_base_files(recipe))
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    assert _hash(_base_files(replace(recipe, model=str(tmp_path / "copy")))) == before
    flip(tmp_path / "m/model.safetensors")
    assert _hash(_base_files(recipe)) != before


@pytest.mark.slow
def test_an_adapter_to_go_on_with_may_not_change(llama, questions_file, tmp_path):
    """Also where no checkpoint was written yet."""
    train(recipe_for(llama, questions_file, tmp_path / "first", training={"max_steps": 1}))
    adapter = tmp_path / "first/adapter"
    recipe = recipe_for(llama, questions_file, tmp_path / "second", training={"save_strategy": "no", "max_steps": 1})
    recipe = replace(recipe, adapter={}, init_adapter=str(adapter))
    train(recipe)
    (tmp_path / "second/summary.json").unlink()  # killed at the end
    flip(adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="changed since its run began: the files of init_adapter; resume with what"):
        train(recipe, resume=True)
    flip(adapter / "adapter_model.safetensors")
    assert train(recipe, resume=True).summary["steps"] == 1


@pytest.mark.slow
def test_a_resumed_run_refuses_other_rows_models_and_batches(llama, questions_file, tmp_path):
    model, rows = tmp_path / "model", tmp_path / "own.jsonl"
    shutil.copytree(llama, model)
    shutil.copy(questions_file, rows)
    recipe = recipe_for(model, rows, tmp_path / "a", training={"save_steps": 3})
    kill_at_step_seven(recipe, tmp_path)
    lines = rows.read_text().splitlines(keepends=True)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file() and path.name != LOCK}

    rows.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(ConfigError, match="changed since its run began: the training rows"):
        train(recipe, resume=True)
    rows.write_text("".join(lines))
    weights = (model / "model.safetensors").read_bytes()
    flip(model / "model.safetensors")
    with pytest.raises(ConfigError, match="changed since its run began: the model's files"):
        train(recipe, resume=True)
    (model / "model.safetensors").write_bytes(weights)
    half = replace(recipe, training={**recipe.training, "per_device_train_batch_size": 4})
    with pytest.raises(ConfigError, match=r"_batch_size 4 and .*_accumulation_steps 2 give the same order"):
        train(half, resume=True)
    assert before == {path: path.read_bytes() for path in before}
    half.training["gradient_accumulation_steps"] = 2
    assert train(half, resume=True).summary["steps"] == 10
