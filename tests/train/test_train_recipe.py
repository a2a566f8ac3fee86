"""The recipe: YAML, overrides, and every wrong field named at once."""

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.recipe import load_recipe

MINIMAL = "model: m\noutput: runs/x\ndata: {path: a.jsonl}\n"


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return load_recipe(path, list(overrides))

    return load


def test_the_recipe_of_the_documentation_is_read_field_by_field(load):
    recipe = load(
        """
model: path-or-hub-id
task: sft
data: {path: train.jsonl, eval: 0.1, format: auto, columns: {prompt: query, completion: response}}
adapter: {variant: bone, r: 64, target_modules: all-linear}
training: {max_steps: 200, learning_rate: 2.0e-4, per_device_train_batch_size: 8}
output: runs/first
merge: true
"""
    )
    assert recipe.model == "path-or-hub-id"
    assert (recipe.data.path, recipe.data.eval, recipe.data.format) == ("train.jsonl", 0.1, "auto")
    assert recipe.data.columns == {"prompt": "query", "completion": "response"}
    assert recipe.adapter == {"variant": "bone", "r": 64, "target_modules": "all-linear"}
    assert recipe.training == {"max_steps": 200, "learning_rate": 2e-4, "per_device_train_batch_size": 8}
    assert recipe.merge is True


def test_overrides_win_over_the_file_and_keep_the_rest(load):
    text = MINIMAL + "adapter: {r: 64, variant: bone}\ntraining: {max_steps: 9, learning_rate: 1e-3}\n"
    recipe = load(text, "--adapter.r=16", "--training.max_steps", "20", "--output", "o", "--data.eval", "50")
    assert recipe.adapter == {"r": 16, "variant": "bone"}
    assert recipe.training == {"max_steps": 20, "learning_rate": 1e-3}
    assert (recipe.output, recipe.data.eval) == ("o", 50)


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "2.0e-4", "0.0002"])
def test_numbers_in_scientific_notation_are_numbers(load, number):
    in_file = load(MINIMAL + f"training: {{learning_rate: {number}, lr_scheduler_kwargs: {{min_lr: {number}}}}}\n")
    assert in_file.training == {"learning_rate": 2e-4, "lr_scheduler_kwargs": {"min_lr": 2e-4}}
    assert load(MINIMAL, "--training.learning_rate", number).training == {"learning_rate": 2e-4}


@pytest.mark.parametrize(("text", "value"), [("null", None), ("0.2", 0.2), ("100", 100), ("e.jsonl", "e.jsonl")])
def test_the_held_out_part_is_a_share_a_count_a_file_or_nothing(load, text, value):
    got = load(MINIMAL, "--data.eval", text).data.eval
    assert got == value
    assert type(got) is type(value)


def test_every_unknown_field_is_named_with_the_nearest_ones(load):
    text = (
        MINIMAL.replace("a.jsonl", "a.jsonl, formt: auto") + "adapter: {rr: 4}\ntraining: {learning_rte: 1}\nmodle: x\n"
    )
    with pytest.raises(ConfigError) as error:
        load(text, "--training.max_stps", "3", "--max_steps", "3")
    message = str(error.value)
    for name, near in {
        "data.formt": "data.format",
        "adapter.rr": "adapter.r",
        "training.learning_rte": "training.learning_rate",
        "modle": "model",
        "training.max_stps": "training.max_steps",
        "max_steps": "training.max_steps",
    }.items():
        assert f"{name} (did you mean {near}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "remedy"),
    [("training.output_dir", "set `output`"), ("adapter.task_type", "set `task`"), ("training.seed", "set `seed`")],
)
def test_fields_that_the_recipe_decides_itself_are_refused_with_the_remedy(load, field, remedy):
    with pytest.raises(ConfigError, match=f"{field} .{remedy}"):
        load(MINIMAL, f"--{field}", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\n", "missing output, data.path"),
        ("model: m\noutput: o\ndata: a.jsonl\n", "missing data.path"),
        (MINIMAL + "merge: perhaps\n", '"merge": Expected a bool'),
        (MINIMAL + "task: chat\n", "\"task\": Expected a Literal.'sft', 'classification'.. Got value: chat"),
        (MINIMAL + "adapter: 5\n", '"adapter"'),
    ],
)
def test_missing_and_mistyped_fields_are_one_clear_line(load, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(text)
    assert "\n" not in str(error.value)


def test_malformed_yaml_is_reported_with_its_line(load):
    with pytest.raises(FormatError, match=r"c\.yaml:3: not valid YAML"):
        load("model: m\noutput: o\n  data: a: b\n")


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_without_a_mapping_is_refused(load, text):
    with pytest.raises(FormatError, match="a mapping with model, data and output was wanted"):
        load(text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such configuration file"):
        load_recipe(tmp_path / "none.yaml")


def test_empty_sections_mean_their_defaults(load):
    recipe = load(MINIMAL + "adapter:\ntraining:\n")
    assert (recipe.adapter, recipe.training) == ({}, {})
