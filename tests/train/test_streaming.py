"""Rows that are read while they are learned: every layout, the same losses after a kill, and what a stream has not."""

import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.loading import load_data
from flashbone.train.plan import plan
from flashbone.train.recipe import DataRecipe, Recipe, load_recipe
from flashbone.train.run import train
from helpers.tiny_llama import questions
from train.training_runs import config_file, kill_at_step_seven, metrics_of, recipe_for

TALK = [{"role": "user", "content": "where ?"}, {"role": "assistant", "content": "on the mat ."}]
LAYOUTS = {
    "text": [{"text": "the cat sat on the mat ."}] * 30,
    "prompt": questions(30),
    "conversation": [{"messages": TALK}] * 30,
}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def stream_of(llama, file, output, training=None, **data):
    fields = {"sources": file, "path": ""} if isinstance(file, list) else {"path": file}
    recipe = DataRecipe(**fields, **{"eval": None, "streaming": True, **data})
    return recipe_for(llama, "", output, data=recipe, training={"max_steps": 4, **(training or {})})


@pytest.mark.parametrize(
    "layout", ["conversation", *(pytest.param(n, marks=pytest.mark.slow) for n in ("text", "prompt"))]
)
def test_each_layout_is_learned_from_a_stream_with_held_out_rows_of_its_own(llama, tmp_path, layout):
    file, held = write(tmp_path / "a.jsonl", LAYOUTS[layout]), write(tmp_path / "h.jsonl", LAYOUTS[layout][:4])
    summary = train(stream_of(llama, file, tmp_path / "out", eval=held)).summary
    assert summary["steps"] == 4
    assert (summary["train_rows"], summary["eval_rows"]) == (30, 4)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_what_becomes_of_rows_is_counted_as_of_rows_on_disk(llama, tmp_path):
    long = {"prompt": "the cat ?", "completion": " sat" * 20}
    gone = {"prompt": "the dog ?" * 20, "completion": " ran"}
    file = write(tmp_path / "a.jsonl", [*questions(13), *[long] * 3, *[gone] * 2])
    changes = {"max_length": 16, "max_steps": 2}
    streamed = train(stream_of(llama, file, tmp_path / "stream", changes)).summary
    data = DataRecipe(file, eval=None)
    stored = train(recipe_for(llama, "", tmp_path / "stored", data=data, training=changes)).summary
    names = ("cut_rows", "lost_ends", "dropped_rows")
    assert [streamed[name] for name in names] == [stored[name] for name in names] == [5, 5, 2]
    assert streamed["train_rows"] == 16  # of which something is learned
    (source,) = streamed["sources"]
    assert (source["format"], source["rows"], source["learned"]) == ("prompt-completion", 18, 16)


def test_what_loaders_read_ahead_is_not_counted(llama, tmp_path):
    file = write(tmp_path / "a.jsonl", questions(60))
    changes = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    summary = train(stream_of(llama, file, tmp_path / "out", changes)).summary
    assert (summary["train_rows"], summary["sources"][0]["learned"]) == (24, 24)


def test_a_bad_row_ends_a_stream_where_it_is_read_and_unused_columns_are_named(tmp_path, caplog):
    rows = [{**row, "id": 1} for row in questions(3000)]
    file = write(tmp_path / "a.jsonl", [*rows[:900], {"prompt": "where ?"}, *rows[901:]])
    data = DataRecipe(file, eval=None, streaming=True)
    with caplog.at_level("INFO"):
        stream = load_data(Recipe("m", data, "o", training={"max_steps": 1})).train
    assert f"data: {file} is read as prompt-completion" in caplog.messages
    assert f"data: {file}: columns not used: id; no format reads them" in caplog.messages
    with pytest.raises(FormatError, match=r"a\.jsonl:901: no 'completion'"):
        next(iter(stream))


def test_sources_of_other_formats_are_mixed_by_weight(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(2000)])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "completion": "x"} for i in range(2000)])
    data = DataRecipe(sources=[{"path": a, "weight": 3}, b], eval=None, streaming=True)
    rows = load_data(Recipe("m", data, "o", training={"max_steps": 1})).train
    first = [json.loads(row["example"]) for _, row in zip(range(800), rows, strict=False)]
    share = sum("text" in row for row in first) / len(first)
    assert 0.7 < share < 0.8
    assert [json.loads(row["example"]) for _, row in zip(range(800), rows, strict=False)] == first


def test_a_folder_is_streamed_as_a_dataset(llama, tmp_path):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", questions(20))
    summary = train(stream_of(llama, str(tmp_path / "rows"), tmp_path / "out")).summary
    assert summary["steps"] == 4


def test_a_stream_is_packed(llama, tmp_path):
    file = write(tmp_path / "a.jsonl", questions(60))
    result = train(stream_of(llama, file, tmp_path / "out", {"packing": True, "max_length": 64, "max_steps": 2}))
    assert result.summary["steps"] == 2


@pytest.mark.slow
def test_a_killed_run_on_a_stream_resumes_to_the_same_losses(llama, tmp_path):
    files = [write(tmp_path / "a.jsonl", questions(64)), write(tmp_path / "b.jsonl", LAYOUTS["text"])]

    def recipe(output):
        return stream_of(llama, files, tmp_path / output, {"save_steps": 2, "max_steps": 10})

    train(recipe("whole"))
    kill_at_step_seven(recipe("resumed"), tmp_path)
    train(load_recipe(config_file(recipe("resumed"), tmp_path / "again.yaml")), resume=True)
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"max_steps": -1}}, "a stream has no length; set training.max_steps"),
        ({"eval": 0.1}, "data.eval: got 0.1, but of a stream no rows can be held out"),
        ({"split": "train[:10]"}, r"data\.split train\[:10\]: a stream cannot be sliced"),
    ],
)
def test_what_a_stream_has_not_is_refused_in_one_line(llama, tmp_path, changes, words):
    file = write(tmp_path / "a.jsonl", questions(8))
    with pytest.raises(ConfigError, match=words) as error:
        train(stream_of(llama, file, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_classifier_and_a_dry_run_need_all_rows(llama, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "x", "label": "y"}])
    recipe = stream_of(llama, file, tmp_path / "out")
    recipe.task = "classification"
    with pytest.raises(ConfigError, match="is for task sft"):
        train(recipe)
    with pytest.raises(ConfigError, match="a dry run reads all rows"):
        plan(stream_of(llama, file, tmp_path / "out"))


def test_a_broken_row_further_on_ends_the_run_with_its_place(llama, tmp_path):
    file = write(tmp_path / "a.jsonl", [*questions(30), {"prompt": "where ?"}])
    with pytest.raises(FormatError, match=r"a\.jsonl:31: no 'completion'"):
        train(stream_of(llama, file, tmp_path / "out"))
