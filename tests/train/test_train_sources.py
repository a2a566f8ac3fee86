"""Several data sets in one run: their weights, held-out rows, formats, and what is refused."""

import gc
import json
from collections import Counter

import pytest

from flashbone.errors import ConfigError
from flashbone.files.records import read_record
from flashbone.train.data.loading import load_data
from flashbone.train.data.windows import Windows
from flashbone.train.recipe import DataRecipe, Recipe, load_recipe
from flashbone.train.run import train
from flashbone.train.summary import Summary
from helpers.tiny_llama import questions
from train.training_runs import config_file, kill_at_step_seven, metrics_of, recipe_for


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts(name, count):
    return [{"text": f"{name}{i}"} for i in range(count)]


def load(sources, task="sft", windows=None, **shared):
    data = DataRecipe(sources=sources, **{"eval": None, **shared})
    return load_data(Recipe(model="m", output="o", task=task, data=data), windows)


def test_a_weight_of_two_repeats_every_row_and_a_half_draws_half_of_them(tmp_path):
    a, b, c = (write(tmp_path / f"{name}.jsonl", texts(name, 10)) for name in "abc")
    data = load([{"path": a, "weight": 2}, {"path": b, "weight": 0.5}, c, {"path": c, "weight": 1.3}])
    times = Counter(row["text"] for row in data.train)
    assert [times[f"a{i}"] for i in range(10)] == [2] * 10
    assert sorted(times[f"b{i}"] for i in range(10)) == [0] * 5 + [1] * 5
    assert sorted(times[f"c{i}"] for i in range(10)) == [2] * 7 + [3] * 3
    assert [(s.rows, s.held_out, s.learned) for s in data.sources] == [
        (10, 0, 20),
        (10, 0, 5),
        (10, 0, 10),
        (10, 0, 13),
    ]


def test_the_draw_of_a_weight_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", texts("a", 20))
    first, again, other = (load([{"path": path, "weight": 0.5}], seed=seed).train["text"][:] for seed in (1, 1, 2))
    assert first == again != other


def test_a_single_path_may_have_a_weight(tmp_path):
    path = write(tmp_path / "a.jsonl", texts("a", 4))
    recipe = Recipe(model="m", output="o", data=DataRecipe(path, eval=None, weight=3))
    assert len(load_data(recipe).train) == 12


def test_held_out_rows_come_from_each_source_and_none_of_them_is_learned(tmp_path):
    a, b = (write(tmp_path / f"{name}.jsonl", texts(name, 10)) for name in "ab")
    data = load([{"path": a, "weight": 3}, b, {"path": b, "split": "train[:80%]", "seed": 5}], eval=0.2)
    held = set(data.eval["text"])
    assert Counter(text[0] for text in data.eval["text"]) == {"a": 2, "b": 4}
    assert not held & set(data.train["text"])
    assert len([text for text in data.train["text"] if text[0] == "a"]) == 24


def test_a_source_may_hold_out_rows_of_its_own_and_all_may_share_a_file(tmp_path):
    a, b, held = (write(tmp_path / f"{name}.jsonl", texts(name, 10)) for name in "abh")
    own = load([{"path": a, "eval": 3}, {"path": b, "eval": held}])
    assert Counter(text[0] for text in own.eval["text"]) == {"a": 3, "h": 10}
    shared = load([a, b], eval=held)
    assert shared.eval["text"][:] == [f"h{i}" for i in range(10)]
    assert len(shared.train) == 20
    part = load([a, b], eval={"path": held, "split": "train[:2]"})
    assert part.eval["text"][:] == ["h0", "h1"]


def test_each_source_has_its_own_format_columns_and_template(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}] * 2)
    b = write(tmp_path / "b.jsonl", [{"instruction": "do", "output": "done"}] * 2)
    data = load([{"path": a, "columns": {"prompt": "q", "completion": "a"}, "template": "<{prompt}>"}, b])
    assert [row["completion"] for row in data.train] == ["y", "y", "done", "done"]
    assert data.train[0]["prompt"] == "<x>"
    assert [source.format for source in data.sources] == ["prompt-completion", "alpaca"]


def test_classes_are_those_of_all_sources(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": "x", "label": "cat"}] * 3)
    b = write(tmp_path / "b.jsonl", [{"text": "x", "label": "dog"}] * 3)
    data = load([a, {"path": b, "weight": 2}], task="classification")
    assert data.labels == ["cat", "dog"]
    assert len(data.train) == 9


def test_of_token_ids_whole_documents_are_repeated_and_drawn(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"input_ids": list(range(10 * n, 10 * n + 9))} for n in range(4)])
    data = load([{"path": a, "weight": 1.5}], windows=Windows(5))
    starts = Counter(row["input_ids"][0] for row in data.train)
    assert sorted(starts.values()) == [1, 1, 1, 1, 2, 2, 2, 2]
    twice = {start // 10 for start, times in starts.items() if times == 2}
    assert all(starts[10 * document] == starts[10 * document + 4] == 2 for document in twice)
    assert data.sources[0].rows == 4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"path": "a.jsonl", "wieght": 2}], r"data\.sources, number 1: got wieght, wanted path"),
        ([{"path": "a.jsonl"}, {"weight": 2}], "number 2: got no path"),
        ([{"path": "a.jsonl", "weight": 0}], r"number 1\.weight: got 0, wanted a positive number"),
        ([{"path": "a.jsonl", "weight": "two"}], r"number 1\.weight: got 'two', wanted a number"),
        ([{"path": "a.jsonl", "sources": []}], "number 1: got sources, which is for all of data"),
        ([3], "sources"),
        ({"path": "a.jsonl", "sources": ["b.jsonl"]}, "got path a.jsonl and sources, wanted one"),
        ({"path": "a.jsonl", "weight": -1}, r"data\.weight: got -1"),
        ({"path": "a.jsonl", "eval": {"split": "test"}}, r"data\.eval: got no path"),
        ({"path": "a.jsonl", "eval": {"path": "b.jsonl", "weight": 2}}, r"data\.eval: got weight"),
        ([], r"missing data\.path"),
    ],
)
def test_a_recipe_with_wrong_sources_is_refused_in_one_line(tmp_path, data, words):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"model": "m", "output": "o", "data": data}))
    with pytest.raises(ConfigError, match=words) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_weight_that_leaves_no_row_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", texts("a", 4))
    with pytest.raises(ConfigError, match=r"a\.jsonl: weight 0\.1 leaves none of its 4 rows"):
        load([{"path": path, "weight": 0.1}])


def test_a_folder_of_several_kinds_of_files_is_refused_since_only_one_would_be_read(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "a.jsonl", texts("a", 4))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "notes.txt").write_text("some notes")
    assert len(load([str(folder)]).train) == 4
    (folder / "b.csv").write_text("text\nb1\nb2\n")
    with pytest.raises(ConfigError, match=r"rows: holds CSV and JSON files, and only one kind .* data\.sources"):
        load([str(folder)])


def test_a_list_in_yaml_and_flags_on_top_make_one_recipe(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\noutput: o\ndata: [{path: a.jsonl, weight: 2}, b.jsonl]\n")
    recipe = load_recipe(path, ["--data.eval", "0.3"])
    assert recipe.data.sources == [{"path": "a.jsonl", "weight": 2}, "b.jsonl"]
    assert recipe.data.eval == 0.3
    path.write_text("model: m\noutput: o\n")
    assert load_recipe(path, ["--data.sources", "[{path: a.jsonl}]"]).data.sources == [{"path": "a.jsonl"}]


@pytest.mark.slow
def test_a_run_on_two_sources_resumes_to_the_same_losses_and_counts_each(llama, tmp_path):
    a, b = write(tmp_path / "a.jsonl", questions(40)), write(tmp_path / "b.jsonl", questions(16)[:13])
    data = DataRecipe(sources=[{"path": a, "weight": 0.5}, {"path": b, "weight": 2}], eval=0.1)

    def recipe(output):
        return recipe_for(llama, a, tmp_path / output, data=data, training={"save_steps": 2})

    train(recipe("whole"))
    kill_at_step_seven(recipe("resumed"), tmp_path)
    result = train(load_recipe(config_file(recipe("resumed"), tmp_path / "again.yaml")), resume=True)
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")
    assert [source["learned"] for source in result.summary["sources"]] == [18, 24]
    assert result.summary["train_rows"] == 42
    assert read_record(Summary, tmp_path / "whole" / "summary.json", "").sources[1].rows == 13


# datasets before 4.8.5 names the type and not the column; before 5.2 it leaves the files to the garbage collector.
COLUMN = "(label: int64 |scalar of type int64)"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"a.jsonl": '{"prompt": "a", "completion": "b"}', "b/c.jsonl": '{"text": "c"}'},
            "a.jsonl has the columns prompt, completion; b/c.jsonl has the columns text; name the files in",
        ),
        (
            {"a.csv": "text,label\nx,y", "b.csv": "text,label,id\nx,y,1"},
            "a.csv has the columns text, label; b.csv has the columns text, label, id; name the files in",
        ),
        ({"a.csv": "text,label\nx,1", "b.csv": "text,label\nx,y"}, COLUMN + ".*; write each column alike in all"),
    ],
)
def test_files_of_a_folder_that_do_not_go_together_are_named_in_one_line(tmp_path, files, problem):
    for name, text in files.items():
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text(text + "\n")
    with pytest.raises(ConfigError, match=rf"rows \(train\): the folder cannot be read: .*{problem}") as error:
        load_data(recipe_for("m", tmp_path / "rows", tmp_path / "out"))
    assert "\n" not in str(error.value)
    del error
    gc.collect()
