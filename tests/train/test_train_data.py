"""Files of every kind are read, split and checked; malformed rows are named with file and line."""

import csv
import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.loading import load_data
from flashbone.train.recipe import DataRecipe, Recipe

PAIRS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]


def load(path, task="sft", test=None, **data):
    return load_data(Recipe(model="m", output="o", task=task, data=DataRecipe(path=str(path), **data)), test=test)


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    rows = [*PAIRS, {"prompt": 'with "quotes", a comma\nand a line', "completion": "é 漢"}]
    data = load(write(tmp_path / f"d.{kind}", rows), eval=None)
    assert data.train.to_list() == rows
    assert data.eval is None


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "d.jsonl", PAIRS)
    assert len(load(path, eval=None).train) == 20
    write(path, PAIRS[:7])
    assert len(load(path, eval=None).train) == 7


def test_the_held_out_draw_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "d.jsonl", PAIRS)
    first, again, other = load(path, eval=0.2), load(path, eval=4), load(path, eval=0.2, seed=7)
    assert first.eval.to_list() == again.eval.to_list() != other.eval.to_list()
    together = [*first.train.to_list(), *first.eval.to_list()]
    assert sorted(row["prompt"] for row in together) == sorted(row["prompt"] for row in PAIRS)


@pytest.mark.parametrize("test", [5, 0.25])
def test_rows_for_a_last_test_are_neither_learned_nor_held_out(tmp_path, test):
    data = load(write(tmp_path / "d.jsonl", PAIRS), eval=3, test=test)
    assert [len(data.train), len(data.eval), len(data.test)] == [12, 3, 5]
    together = [row["prompt"] for part in (data.train, data.eval, data.test) for row in part]
    assert sorted(together) == sorted(row["prompt"] for row in PAIRS)


def test_the_test_rows_can_be_a_file_and_stay_in_its_order(tmp_path):
    tested = [{"prompt": f"q{i}", "completion": "a"} for i in range(7)]
    data = load(write(tmp_path / "d.jsonl", PAIRS), eval=3, test=str(write(tmp_path / "t.jsonl", tested)))
    assert data.test.to_list() == tested
    assert len(data.train) == 17


def test_the_test_rows_may_have_names_of_their_own(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"q": "1 + 1", "a": "2"}])
    part = DataRecipe(path=str(path), format="alpaca", columns={"instruction": "q", "output": "a"})
    data = load(write(tmp_path / "d.jsonl", PAIRS), eval=3, test=part)
    assert data.test[0]["completion"] == "2"
    assert "### Instruction:\n1 + 1\n" in data.test[0]["prompt"]
    assert len(data.train) == 17


def test_a_template_goes_around_each_prompt(tmp_path):
    path = write(tmp_path / "d.jsonl", PAIRS)
    plain, framed = load(path, eval=None), load(path, eval=None, template="Question: {prompt}\nAnswer:")
    assert framed.train[3] == {"prompt": "Question: p3\nAnswer:", "completion": "c3"}
    assert plain.train[3] == PAIRS[3]


@pytest.mark.parametrize(
    ("template", "words"), [("Answer:", "with {prompt} in it"), ("{prompt}", "no prompt of their own")]
)
def test_a_template_without_a_place_or_a_prompt_is_refused(tmp_path, template, words):
    rows = PAIRS if template == "Answer:" else [{"text": "t"}] * 4
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path / "d.jsonl", rows), eval=None, template=template)


def test_conversations_stay_on_one_side_of_the_test_rows(tmp_path):
    turns = [{"role": role, "content": f"{{i}} {role}"} for role in ("user", "assistant") * 2]
    rows = [{"messages": [{**turn, "content": turn["content"].format(i=i)} for turn in turns]} for i in range(10)]
    data = load(write(tmp_path / "d.jsonl", rows), eval=2, test=3)
    parts = (data.train, data.eval, data.test)
    numbers = [{json.loads(row["conversation"])["messages"][0]["content"].split()[0] for row in part} for part in parts]
    assert [len(part) for part in numbers] == [5, 2, 3]
    assert len(set.union(*numbers)) == 10


def test_a_file_can_be_the_held_out_part(tmp_path):
    held = write(tmp_path / "e.csv", PAIRS[:3])
    data = load(write(tmp_path / "d.jsonl", PAIRS), eval=str(held), split="train[:10]")
    assert (len(data.train), data.eval.to_list()) == (10, PAIRS[:3])


@pytest.mark.parametrize(
    ("split", "rows"), [("train[:5]", PAIRS[:5]), ("train[50%:]", PAIRS[10:]), ("train[-2:]", PAIRS[-2:])]
)
def test_splits_cut_files_as_they_cut_hub_datasets(tmp_path, split, rows):
    assert load(write(tmp_path / "d.jsonl", PAIRS), eval=None, split=split).train.to_list() == rows


@pytest.mark.parametrize("split", ["test", "train[a:]", "train[5:5]"])
def test_a_split_that_is_not_there_is_refused(tmp_path, split):
    with pytest.raises(ConfigError, match=r"data\.split"):
        load(write(tmp_path / "d.jsonl", PAIRS), split=split)


@pytest.mark.parametrize("share", [20, 0.999, -1, 1.5])
def test_a_held_out_part_that_leaves_nothing_is_refused(tmp_path, share):
    with pytest.raises(ConfigError, match=r"data\.eval"):
        load(write(tmp_path / "d.jsonl", PAIRS), eval=share)


def test_a_folder_is_loaded_as_a_dataset(tmp_path):
    write(tmp_path / "train.jsonl", PAIRS)
    assert load(tmp_path, eval=None, split="train[:5]").train.to_list() == PAIRS[:5]


def test_a_conversation_is_one_row_whatever_is_learned_of_it(tmp_path):
    talk = [{"role": r, "content": "x"} for r in ("user", "assistant") * 3]
    data = load(write(tmp_path / "d.jsonl", [{"messages": talk}] * 10), eval=2)
    assert (len(data.train), len(data.eval)) == (8, 2)
    assert data.conversational
    assert len(load(tmp_path / "d.jsonl", eval=2, turns="last").train) == 8


def test_malformed_rows_are_named_with_file_and_line(jsonl):
    path = jsonl([PAIRS[0], "{broken", {}, "", {"prompt": "a", "completion": 3}, "[1]", PAIRS[1]])
    with pytest.raises(FormatError) as error:
        load(path)
    message = str(error.value)
    for expected in (
        "rows.jsonl:2: not valid JSON: Expecting property name",
        "rows.jsonl:3: no 'prompt' and no 'completion'",
        "rows.jsonl:5: 'completion' is of type int (3)",
        "rows.jsonl:6: holds a list",
    ):
        assert expected in message
    assert "\n" not in message
    assert "more" not in message


def test_of_many_malformed_rows_the_first_few_are_shown_and_the_rest_counted(jsonl):
    with pytest.raises(FormatError, match=r"rows\.jsonl:5: .*; and 5 more$") as error:
        load(jsonl(["{"] * 10))
    assert "rows.jsonl:6" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_an_empty_file_is_refused(tmp_path, kind):
    (tmp_path / f"d.{kind}").write_text("")
    with pytest.raises(FormatError, match=f"d.{kind}: no rows"):
        load(tmp_path / f"d.{kind}")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"none\.jsonl: no such data file"):
        load(tmp_path / "none.jsonl")


def test_a_csv_row_of_another_width_is_named_with_its_line(tmp_path):
    (tmp_path / "d.csv").write_text('prompt,completion\na,b\n"two\nlines",d\ne\nf,g,h\n')
    with pytest.raises(FormatError) as error:
        load(tmp_path / "d.csv")
    assert "d.csv:5: fewer cells than the 2 columns" in str(error.value)
    assert "d.csv:6: more cells than the 2 columns" in str(error.value)


def test_other_encodings_and_kinds_are_refused(tmp_path):
    (tmp_path / "d.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(FormatError, match="not UTF-8"):
        load(tmp_path / "d.jsonl")
    (tmp_path / "d.xlsx").write_text("x")
    with pytest.raises(FormatError, match="unknown kind of file"):
        load(tmp_path / "d.xlsx")
    (tmp_path / "d.parquet").write_text("x")
    with pytest.raises(FormatError, match="not a valid parquet file"):
        load(tmp_path / "d.parquet")


def test_an_unknown_hub_id_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"data\.path nobody/nothing .*no dataset of that id") as error:
        load("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "a", "text": "b"}', "specified twice"),
        ('{"text": ' + "[" * 3000 + "]" * 3000 + "}", "(recursion|depth)"),
    ],
)
def test_a_folder_of_rows_that_cannot_be_read_says_why_in_one_line(tmp_path, row, reason):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' + row + "\n")
    with pytest.raises(ConfigError, match=rf"the folder cannot be read: .*{reason}.*; mend") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_with_a_script_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(
        ConfigError, match=r"out of a script, rows\.py, and scripts are never run; give .* as a"
    ) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "sorted_labels"), [((10, 9, 2), ["2", "9", "10"]), (("b", "a", "c"), ["a", "b", "c"])]
)
def test_classes_are_sorted_by_number_or_name(tmp_path, labels, sorted_labels):
    rows = [{"text": f"t{i}", "label": labels[i % 3]} for i in range(30)]
    assert load(write(tmp_path / "d.jsonl", rows), task="classification").labels == sorted_labels


def test_one_class_or_an_unseen_held_out_class_is_refused(tmp_path):
    rows = [{"text": "t", "label": "a"}] * 5
    with pytest.raises(FormatError, match="all training rows have the label 'a'"):
        load(write(tmp_path / "d.jsonl", rows), task="classification")
    write(tmp_path / "d.jsonl", [*rows, {"text": "t", "label": "b"}])
    held = write(tmp_path / "e.jsonl", [{"text": "t", "label": "z"}])
    with pytest.raises(FormatError, match="labels that no training row has: z"):
        load(tmp_path / "d.jsonl", task="classification", eval=str(held))


def test_an_unseen_class_among_the_test_rows_is_refused(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(10)]
    test = write(tmp_path / "test.jsonl", [{"text": "t", "label": "c"}])
    with pytest.raises(FormatError, match="labels that no training row has: c"):
        load(write(tmp_path / "d.jsonl", rows), "classification", eval=None, test=str(test))


def test_a_format_of_the_other_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.format text does not go with task classification"):
        load(write(tmp_path / "d.jsonl", PAIRS), task="classification", format="text")
