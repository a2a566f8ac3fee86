"""Classes: their names out of files that have them, rows without one, and labels that only look like numbers."""

import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from flashbone.errors import FormatError
from flashbone.train.classify import encoded, tokenized
from flashbone.train.data.loading import load_data
from flashbone.train.data.rows import read_rows
from flashbone.train.recipe import DataRecipe, Recipe
from helpers.tiny_llama import WORDS, word_tokenizer

NAMES = ["bad", "good"]


def load(path, **data):
    return load_data(
        Recipe(model="m", output="o", task="classification", data=DataRecipe(str(path), eval=None, **data))
    )


def named(rows):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=features)


def test_parquet_files_that_name_their_classes_give_the_names(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(4)]
    named(rows).to_parquet(tmp_path / "d.parquet")
    assert [row["label"] for _, row in read_rows(tmp_path / "d.parquet")] == ["bad", "good"] * 2
    assert load(tmp_path / "d.parquet").labels == NAMES


def test_datasets_that_name_their_classes_give_the_names(tmp_path):
    named([{"text": f"t{i}", "label": i % 2} for i in range(4)]).to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path).train["label"][:] == ["bad", "good"] * 2


def test_a_list_of_one_class_is_that_class_and_several_are_refused_with_what_to_do(tmp_path):
    classes = datasets.List(datasets.ClassLabel(names=NAMES))
    features = datasets.Features({"text": datasets.Value("string"), "labels": classes})
    for name, labels in (("one", [[0], [1]]), ("two", [[0], [0, 1]])):
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "labels": labels}, features)
        rows.to_parquet(tmp_path / f"{name}.parquet")
    assert load(tmp_path / "one.parquet").train["label"][:] == NAMES
    with pytest.raises(FormatError, match=r"row 2: 'label' is .*bad.*: several classes of a text .*_label_") as error:
        load(tmp_path / "two.parquet")
    assert "\n" not in str(error.value)


def test_a_class_beyond_the_names_is_refused(tmp_path):
    table = named([{"text": "a", "label": 0}, {"text": "b", "label": 1}]).data.table
    table = table.set_column(1, table.schema.field("label"), pyarrow.array([0, 7]))
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(FormatError, match=r"row 2: 'label' is the class 7, but only 2 have a name"):
        load(tmp_path / "d.parquet")


def test_broken_notes_beside_sound_columns_are_left_alone(tmp_path):
    table = pyarrow.table({"text": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": "{broken"})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert [row for _, row in read_rows(tmp_path / "d.parquet")] == [{"text": "a", "label": 1}]


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(FormatError, match="several columns have the name 'text'"):
        list(read_rows(tmp_path / "d.parquet"))


def test_keys_that_parquet_adds_to_turns_are_not_used_and_not_named(tmp_path, caplog):
    turns = [{"role": "user", "content": "a", "id": None}, {"role": "assistant", "content": "b", "weight": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "d.parquet")
    data = load_data(Recipe(model="m", output="o", data=DataRecipe(str(tmp_path / "d.parquet"), eval=None)))
    assert len(data.train) == 1
    assert "not used" not in caplog.text


GOOD = [{"text": f"t{i}", "label": NAMES[i % 2]} for i in range(4)]


@pytest.mark.parametrize("label", [None, -1, "-1", -1.0, " ", "nan", -100])
def test_a_row_without_a_class_is_refused_or_left_out_and_counted(jsonl, caplog, label):
    path = jsonl([*GOOD[:2], {"text": "none", "label": label}, *GOOD[2:]])
    with pytest.raises(FormatError, match=r"rows\.jsonl:3: 'label' is .*, which marks a row without a class") as error:
        load(path)
    assert "data.drop_unlabelled: true" in str(error.value)
    for _ in range(2):  # read, and out of the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data = load(path, drop_unlabelled=True)
        assert data.train["text"][:] == ["t0", "t1", "t2", "t3"]
        assert "1 of 5 rows left out: no class" in caplog.text


def test_numbers_of_hub_datasets_without_a_class_are_left_out(tmp_path):
    named([{"text": f"t{i}", "label": (0, 1, -1, None)[i % 4]} for i in range(8)]).to_parquet(tmp_path / "d.parquet")
    assert load(tmp_path / "d.parquet", drop_unlabelled=True).train["label"][:] == ["bad", "good"] * 2


def test_rows_of_which_none_has_a_class_are_refused(jsonl):
    with pytest.raises(FormatError, match="all 3 rows are left out: no class"):
        load(jsonl([{"text": "a", "label": -1}] * 3), drop_unlabelled=True)


@pytest.mark.parametrize("labels", [("²", "1"), ("٣", "-"), ("9" * 5000, "1"), ("--1", "2"), ("1.5", "01")])
def test_labels_that_look_like_numbers_are_names(jsonl, labels):
    rows = [{"text": "t", "label": label} for label in labels]
    assert load(jsonl(rows)).labels == sorted(labels)


@pytest.mark.parametrize("label", [1.5, {"a": 1}])
def test_what_is_neither_a_name_nor_a_whole_number_is_refused(jsonl, label):
    with pytest.raises(FormatError, match=r"rows\.jsonl:1: 'label' is of type .*a name or a whole number was wanted"):
        load(jsonl([{"text": "t", "label": label}]))


def test_a_broken_row_has_one_line_however_it_is_written(jsonl):
    rows = [json.dumps({"text": "a\nb" * 40, "label": ["x\ny"]})]
    with pytest.raises(FormatError) as error:
        load(jsonl(rows))
    assert "\n" not in str(error.value)


def test_truth_values_are_names(jsonl):
    path = jsonl([{"text": f"a {i}", "label": bool(i % 2)} for i in range(4)])
    assert load(path).labels == ["False", "True"]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"premise": "a cat", "hypothesis": "a dog"}, ("a cat", "a dog")),
        ({"sentence1": "a cat", "sentence2": "a dog"}, ("a cat", "a dog")),
        ({"question1": "a cat", "question2": "a dog"}, ("a cat", "a dog")),
        ({"question": "a cat", "sentence": "a dog"}, ("a cat", "a dog")),
        ({"text": "a cat", "text_pair": "a dog"}, ("a cat", "a dog")),
        ({"Sentence": "a cat"}, ("a cat", None)),
        ({"content": "a cat", "title": "no"}, ("a cat", None)),
    ],
)
@pytest.mark.parametrize("label", ["label", "labels", "Sentiment"])
def test_texts_and_pairs_of_texts_are_read_under_the_names_that_data_sets_have(jsonl, row, pair, label):
    path = jsonl([{**row, label: name} for name in "ab" for _ in range(2)])
    data = load(path)
    assert (data.train["text"][0], data.train[0].get("text_pair")) == pair
    assert data.labels == ["a", "b"]


def test_of_two_names_that_may_be_meant_none_is_taken(jsonl):
    with pytest.raises(FormatError, match="columns review, sentence, label fit no format of task classification"):
        load(jsonl([{"review": "a", "sentence": "b", "label": "c"}]))


@pytest.mark.parametrize("separator", [None, "[SEP]"])
def test_a_pair_is_read_as_the_tokenizer_writes_pairs_and_else_with_a_blank_line(separator):
    words = [*WORDS.split(), "<pad>", "[CLS]", "[SEP]", "<unk>"]
    tokenizer = word_tokenizer(words, "<pad>", "[CLS]", "[SEP]", "<unk>")
    tokenizer.sep_token = separator
    rows = {"text": ["the cat", "a dog"], "text_pair": ["a dog", "it"]}
    whole = ["the cat\n\na dog", "a dog\n\nit"]
    wanted = tokenizer(rows["text"], rows["text_pair"]) if separator else tokenizer(whole)
    assert encoded(rows, tokenizer) == wanted
    some = {**rows, "text_pair": ["a dog", None]}  # of several sources
    assert encoded(some, tokenizer)["input_ids"] == tokenizer([whole[0], "a dog"])["input_ids"]


def test_the_log_counts_the_texts_that_are_cut(caplog):
    caplog.set_level("INFO")
    tokenizer = word_tokenizer([*WORDS.split(), "<pad>", "[CLS]", "[SEP]", "<unk>"], "<pad>", "[CLS]", "[SEP]", "<unk>")
    rows = datasets.Dataset.from_dict({"text": ["the cat", "the cat sat", "the cat sat on a mat"], "label": ["a"] * 3})
    made, counts = tokenized(rows, ["a"], tokenizer, 5)
    assert [len(ids) for ids in made["input_ids"]] == [4, 5, 5]
    assert (counts.rows, counts.cut) == (3, 1)
    assert caplog.messages[-1] == "data: of 3 rows 1 are cut at training.max_length 5"
    assert tokenized(rows, ["a"], tokenizer, 4)[1].cut == 2
    assert caplog.records[-1].levelname == "WARNING"  # more than half of them
