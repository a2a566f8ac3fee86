"""Token ids instead of text: windows, the held-out documents, what is refused, and whole runs on a tiny Llama."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_runs import kill_at_step_seven, metrics_of, recipe_for

from flashbone.cli import main
from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.formats import choose_format, converter
from flashbone.train.data.loading import load_data
from flashbone.train.data.windows import Windows
from flashbone.train.recipe import DataRecipe, Recipe
from flashbone.train.run import train
from helpers.binidx import write_binidx
from helpers.comparison import Promise, same_bits
from helpers.tiny_llama import WORDS, questions, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]

WORDS_END = len(WORDS.split()) + 7  # the special tokens come first


def documents(count: int, size: int = 20) -> list[list[int]]:
    """Documents that a model can learn, each of another size; a document's first token names it."""
    return [[7 + i % 20, *(7 + (i + 3 * j) % 20 for j in range(size + i))] for i in range(count)]


def load(path, windows=None, task="sft", **data):
    return load_data(Recipe(model="m", output="o", task=task, data=DataRecipe(path=str(path), **data)), windows)


@pytest.fixture
def pair(tmp_path):
    def write(rows, name="d"):
        return write_binidx(tmp_path / name, rows)

    return write


@given(size=st.integers(0, 40), length=st.integers(2, 12))
def test_each_token_but_a_documents_first_is_learned_in_exactly_one_window(size, length):
    document = list(range(size))
    windows = [document[part] for part in Windows(length).slices(size)]
    assert [token for window in windows for token in window[1:]] == document[1:]
    assert all(2 <= len(window) <= length for window in windows)
    assert all(len(window) == length for window in windows[:-1])


@given(size=st.integers(0, 40), length=st.integers(2, 12))
def test_windows_without_overlap_are_the_document(size, length):
    document = list(range(size))
    windows = [document[part] for part in Windows(length, 0).slices(size)]
    assert [token for window in windows for token in window] == document
    assert all(1 <= len(window) <= length for window in windows)


def test_without_a_length_documents_stay_whole():
    assert list(Windows().slices(5)) == [slice(0, 5)]
    assert not list(Windows().slices(1))


@pytest.mark.parametrize("name", ["d", "d.bin", "d.idx", "d.jsonl", "d.parquet"])
def test_every_kind_of_file_gives_the_same_windows(tmp_path, pair, jsonl, name):
    rows = documents(6)
    pair(rows)
    jsonl([{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows], "d.jsonl")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), tmp_path / "d.parquet")
    data = load(tmp_path / name, Windows(8), eval=None)
    want = [ids[start : start + 8] for ids in rows for start in range(0, len(ids) - 1, 7)]
    assert data.train.to_list() == [{"input_ids": window} for window in want]


def test_no_window_of_a_held_out_document_is_trained_on(pair):
    data = load(pair(documents(20)), Windows(8), eval=0.25)
    first, again, other = (load(pair(documents(20), f"e{i}"), Windows(8), eval=5, seed=i // 2) for i in range(1, 4))
    texts = {tuple(ids): i for i, document in enumerate(documents(20)) for ids in [document]}
    named = {part: set() for part in ("train", "eval")}
    for part, numbers in named.items():
        windows = getattr(data, part)["input_ids"][:]
        numbers.update(i for document, i in texts.items() for ids in windows if document[: len(ids)] == tuple(ids))
    assert len(named["eval"]) == 5
    assert len(named["train"]) == 15
    assert not named["eval"] & named["train"]
    assert first.eval.to_list() != again.eval.to_list() == other.eval.to_list()
    tokens = [sum(len(ids) - 1 for ids in part["input_ids"]) for part in (data.train, data.eval)]
    assert sum(tokens) == sum(len(ids) - 1 for ids in documents(20))


def test_a_split_cuts_by_document(pair):
    data = load(pair(documents(6)), Windows(8), eval=None, split="train[1:3]")
    whole = [load(pair([ids], f"one{i}"), Windows(8), eval=None).train.to_list() for i, ids in enumerate(documents(6))]
    assert data.train.to_list() == whole[1] + whole[2]


def test_a_changed_pair_and_another_length_are_cut_again(tmp_path, pair):
    path = pair(documents(4))
    assert len(load(path, Windows(8), eval=None).train) != len(load(path, Windows(9), eval=None).train)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").unlink()
    before = len(load(pair(documents(3), "other"), Windows(8), eval=None).train)
    assert len(load(pair(documents(3)), Windows(8), eval=None).train) == before


def test_how_many_windows_came_of_the_documents_is_logged(pair, caplog):
    path = pair([[7, 8, 9], [7], [], [7] * 20])
    with caplog.at_level("INFO", logger="flashbone"):
        load(path, Windows(8), eval=None)
    assert f"data: {path} is read as tokens" in caplog.text
    assert f"data: {path}: 2 documents make 4 windows of at most 8 tokens" in caplog.text


def test_documents_of_one_token_alone_are_refused(pair):
    with pytest.raises(FormatError, match="d: no document has two tokens; one is context, and the next is learned"):
        load(pair([[7], [8], []]), eval=None)


def test_columns_of_text_come_before_tokens_unless_they_are_asked_for():
    assert choose_format({"input_ids": [3], "labels": [3]}, "sft", "d") == ("tokens", {})
    assert choose_format({"text": "a", "input_ids": [3]}, "sft", "d") == ("text", {})
    assert converter("tokens", {"input_ids": "ids"})({"ids": [3], "text": "a"}) == {"input_ids": [3]}
    with pytest.raises(FormatError, match="fit no format of task classification"):
        choose_format({"input_ids": [3]}, "classification", "d")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": []}, "'input_ids' is empty; a list of token ids was wanted"),
        ({"input_ids": "abc"}, r"'input_ids' is of type str \(abc\)"),
        ({"input_ids": [1, -2]}, "'input_ids' holds -2; token ids were wanted"),
        ({"input_ids": [1, 2.0]}, "'input_ids' holds 2.0"),
        ({"input_ids": [True]}, "'input_ids' holds True"),
        ({"input_ids": [2**31]}, "'input_ids' holds 2147483648"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "'labels' leaves tokens out, but every token .* is learned"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "'attention_mask' leaves tokens out"),
        ({"input_ids": np.array([3, -1])}, "'input_ids' go from -1 to 3; token ids were wanted"),
        ({"input_ids": np.array([3, 2**31])}, "'input_ids' go from 3 to 2147483648"),
    ],
)
def test_what_is_no_token_id_is_refused(row, message):
    with pytest.raises(FormatError, match=message):
        converter("tokens", {})(row)


def test_a_document_with_a_negative_id_is_named(tmp_path):
    write_binidx(tmp_path / "d", [[1, 2], [3, -4]], letter="i")
    with pytest.raises(FormatError, match=r"d\.idx: document 1: 'input_ids' go from -4 to 3") as error:
        load(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_a_name_without_files_is_no_pair(tmp_path):
    with pytest.raises(FormatError, match=r"none\.bin: no such file|none\.idx: no such file"):
        load(tmp_path / "none.idx")


def run_of(llama, path, output, **training) -> Recipe:
    training = {"max_length": 16, "save_steps": 3, "logging_steps": 4, **training}
    return recipe_for(llama, path, output, training=training)


@pytest.mark.slow
def test_a_run_learns_from_windows_and_resumes_to_the_same_losses(llama, pair, tmp_path, capsys):
    path = pair(documents(40))
    straight, resumed = (run_of(llama, path, tmp_path / name) for name in ("a", "b"))
    config = tmp_path / "a.yaml"
    config.write_text(json.dumps({"model": str(llama), "data": {"path": str(path)}, "output": straight.output}))
    flags = [f"--training.{key}={value}" for key, value in straight.training.items()]
    assert main(["train", str(config), "--adapter.r=8", *flags, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    kill_at_step_seven(resumed, tmp_path)
    train(resumed, resume=True)

    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.2
    assert summary["train_rows"] + summary["eval_rows"] == sum(-(-(len(ids) - 1) // 15) for ids in documents(40))
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    blocks = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("a", "b")]
    assert all(same_bits(blocks[1][key], blocks[0][key], Promise.RESUMED) for key in blocks[0])


@pytest.mark.slow
def test_tokens_give_the_losses_of_the_text_they_are_from(llama, jsonl, pair, tmp_path):
    texts = [row["prompt"] + row["completion"] for row in questions(40)]
    tokenizer = tiny_tokenizer()
    path = pair([tokenizer(text + "</s>")["input_ids"] for text in texts])
    train(run_of(llama, path, tmp_path / "tokens"))
    train(run_of(llama, jsonl([{"text": text} for text in texts]), tmp_path / "text"))
    assert metrics_of(tmp_path / "tokens") == metrics_of(tmp_path / "text")


def test_wrapped_packing_trains_on_full_windows_of_the_stream(llama, pair, tmp_path):
    rows = documents(40)
    recipe = run_of(llama, pair(rows), tmp_path / "run", packing=True, packing_strategy="wrapped", max_steps=3)
    recipe.data.eval = None
    summary = train(recipe).summary
    assert summary["tokens"] == 3 * 8 * 16
    assert summary["train_rows"] == sum(-(-len(ids) // 16) for ids in rows)


def test_packing_by_best_fit_takes_windows_too(llama, pair, tmp_path):
    recipe = run_of(llama, pair(documents(40)), tmp_path / "run", packing=True, max_steps=1)
    assert train(recipe).summary["steps"] == 1


@pytest.mark.parametrize("held_out", [False, True])
def test_token_ids_that_the_model_does_not_know_are_refused_before_training(llama, pair, tmp_path, held_out):
    good, bad = pair(documents(40)), pair([*documents(3), [7, WORDS_END]], "bad")
    recipe = run_of(llama, good if held_out else bad, tmp_path / "run")
    recipe.data.eval = str(bad) if held_out else None
    message = rf"bad: holds the token id {WORDS_END}, but the model has {WORDS_END} embeddings, 0 to"
    with pytest.raises(FormatError, match=message) as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert "was it tokenised for another model?" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_windows_of_one_token_are_refused(llama, pair, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.max_length is 1; wanted at least 2: a token and the next"):
        train(run_of(llama, pair(documents(4)), tmp_path / "run", max_length=1))
