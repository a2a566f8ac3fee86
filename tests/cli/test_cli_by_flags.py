"""`flashbone train` without a file: everything by flags, and `--save-recipe`, which makes a file of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbone import cli
from flashbone.files.plain_yaml import parse_yaml, yaml_text
from flashbone.train.recipe import load_recipe, recipe_text
from helpers.tiny_llama import questions, write_tiny_llama


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("flags")
    write_tiny_llama(folder / "llama")
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    return folder


@pytest.fixture
def here(workplace, monkeypatch, tmp_path):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workplace / "cache"))
    return workplace


FLAGS = ["--model", "llama", "--data.path", "q.jsonl", "--adapter.r", "8", "--training.max_steps", "2", "--samples=0"]
FLAGS += [
    "--data.eval",
    "null",
    "--training.logging_steps",
    "1",
    "--training.use_cpu",
    "true",
    "--training.disable_tqdm",
    "true",
    "--training.run_name",
    '"007"',
]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "train_s"} for row in rows]


def test_flags_train_and_the_recipe_that_they_save_trains_to_the_same_losses(here, capsys):
    assert cli.main(["train", *FLAGS, "--output", "runs/a", "--save-recipe", "saved.yaml", "--json"]) == 0
    assert cli.main(["train", "saved.yaml", "--output=runs/b", "--json"]) == 0
    assert losses(here / "runs/a") == losses(here / "runs/b")
    assert len(losses(here / "runs/a")) == 2
    saved = load_recipe("saved.yaml")
    assert (saved.output, saved.training["run_name"], saved.seed) == ("runs/a", "007", 42)
    before = (here / "saved.yaml").read_text()
    capsys.readouterr()
    assert cli.main(["train", *FLAGS, "--output", "runs/a", "--save-recipe=saved.yaml", "--resume", "--json"]) == 0
    assert cli.main(["train", *FLAGS, "--output", "runs/c", "--save-recipe=saved.yaml"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flashbone train: error: --save-recipe saved.yaml: exists already, and is another recipe")
    assert (here / "saved.yaml").read_text() == before
    assert not (here / "runs/c").exists()


def test_a_dry_run_saves_the_recipe_and_what_is_refused_saves_none(here, capsys):
    assert cli.main(["train", *FLAGS, "--output", "runs/d", "--dry-run", "--json", "--save-recipe", "dry.yaml"]) == 0
    assert load_recipe("dry.yaml").output == "runs/d"
    wrong = ["train", *FLAGS, "--output", "runs/d", "--model", "nowhere/", "--save-recipe", "wrong.yaml"]
    assert cli.main(wrong) == 1
    assert not (here / "wrong.yaml").exists()
    assert not (here / "runs/d").exists()


def test_what_flags_lack_is_named(capsys):
    assert cli.main(["train", "--model", "llama"]) == 1
    assert capsys.readouterr().err == "flashbone train: error: the command line: missing output, data.path\n"
    assert cli.main(["train", "--resume"]) == 2
    assert "wanted CONFIG.yaml, or --model, --data.path and --output" in capsys.readouterr().err


def test_several_places_of_rows_can_be_a_flag_too():
    flags = ["--model", "m", "--output", "o", "--data", "[a.jsonl, {path: b.jsonl, weight: 2}]", "--data.eval", "5"]
    data = load_recipe(None, flags).data
    assert (data.sources, data.eval) == (["a.jsonl", {"path": "b.jsonl", "weight": 2}], 5)


words = st.sampled_from(
    ["no", "007", "0x1F", "2e-4", "1_0", "~", "null", "<<", ".nan", "- a", "a: b", "#", "'", '"', ""]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
leaves |= st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.dates().map(str)
keys = words | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5)


@settings(max_examples=50)
@given(
    st.dictionaries(
        keys,
        st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)),
        max_size=4,
    )
)
def test_plain_data_written_as_yaml_is_read_back_equal(content):
    assert repr(parse_yaml(yaml_text(content), "x")) == repr(content)


def test_a_saved_recipe_holds_what_differs_from_the_defaults_alone():
    flags = ["--model", "m", "--output", "o", "--data.path", "d.jsonl", "--data.turns", "last", "--merge", "false"]
    assert recipe_text(load_recipe(None, flags)).splitlines() == [
        "model: m",
        "data:",
        "  path: d.jsonl",
        "  turns: last",
        "output: o",
        "seed: 42",
    ]
