"""The recipe: YAML, overrides, and every wrong field named at once."""

import pytest

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.train.adapters import adapter_config
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
        (MINIMAL + "merge: perhaps\n", r"c\.yaml: merge: got 'perhaps', wanted true or false$"),
        (MINIMAL + "task: chat\n", "task: got 'chat', wanted sft, dpo, kto, reward, grpo or classification$"),
        (MINIMAL + "adapter: 5\n", "adapter: got 5, wanted an object"),
        ("model: ''\noutput: ''\ndata: {path: a}\n", "missing model, output"),
        (MINIMAL + "seed: -1\n", r"c\.yaml: seed: got -1, wanted 0 to 4294967295$"),
        (MINIMAL.replace("a.jsonl", "a.jsonl, seed: -2"), r"data\.seed: got -2, wanted 0 to 4294967295$"),
        (MINIMAL + "training: {data_seed: 4294967296}\n", r"training\.data_seed: got 4294967296, wanted 0 to"),
    ],
)
def test_missing_and_mistyped_fields_are_one_clear_line(load, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--training.learning_rate", "abc"), "training.learning_rate: got 'abc', wanted a number$"),
        (("--training.max_steps", "ten"), "training.max_steps: got 'ten', wanted a whole number$"),
        (("--training.max_steps=1.5",), "training.max_steps: got 1.5, wanted a whole number$"),
        (("--training.learning_rate", ".nan"), "training.learning_rate: got nan, wanted a number$"),
        (("--training.use_cpu", "'true'"), "training.use_cpu: got 'true', wanted true or false$"),
        (("--adapter.r", "[8"), "--adapter.r.*: not valid YAML"),
        (
            ("--adapter.r", "!!python/name:os.system"),
            "--adapter.r.*: not valid YAML: could not determine a constructor",
        ),
        (("--adapter.rank_pattern.q_proj", "many"), "adapter.rank_pattern: got .*, wanted an object"),
        (("--data", "{path: a, pth: b}"), "unknown field: data.pth"),
        (("--data", "rows.yaml"), "missing data.path"),
        (("--data.columns", "evil.yaml"), "data.columns: got 'evil.yaml', wanted an object"),
        (("--model.name", "x"), "--model.name: model is 'm', and has no fields"),
        (("--print_config", "x"), "unknown field: print_config"),
        (("--config", "evil.yaml"), "unknown field: config"),
        (("--training.max_steps",), "--training.max_steps: wanted a value after it"),
        (("stray",), "'stray': wanted --dotted.field value"),
        (("--merge+", "true"), "unknown field: merge"),
    ],
)
def test_what_a_flag_cannot_mean_is_one_clear_line(load, flags, message):
    with pytest.raises(FlashboneError, match=message) as error:
        load(MINIMAL, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("quoted", "text"), [('"0"', "0"), ("'1e-3'", "1e-3"), ('"null"', "null"), ("'true'", "true")])
def test_a_quoted_value_stays_a_string(load, quoted, text):
    recipe = load(
        MINIMAL.replace("a.jsonl", f"a.jsonl, columns: {{label: {quoted}}}") + f"training: {{run_name: {quoted}}}"
    )
    assert (recipe.data.columns, recipe.training) == ({"label": text}, {"run_name": text})
    flags = load(MINIMAL, "--training.run_name", quoted, "--data.columns.label", quoted)
    assert (flags.data.columns, flags.training) == ({"label": text}, {"run_name": text})


@pytest.mark.parametrize("word", ["no", "Yes", "off", "1", "1e-3", "0x1F", "~", "null", ".inf", "2024-01-01"])
def test_a_key_is_text_as_it_is_written(load, word):
    assert load(MINIMAL.replace("a.jsonl", f"a.jsonl, columns: {{{word}: text}}")).data.columns == {word: "text"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {run_name: no}\n", "training.run_name: got False, wanted a string or null; put it in quotes if"),
        ("training: {run_name: 1e3}\n", "training.run_name: got 1000.0, wanted .*; put it in quotes if it is text$"),
        ("seed: on\n", "seed: got True, wanted a whole number$"),
        ("init_adapter: 5\n", "init_adapter: got 5, wanted a string or null; put it in quotes if it is text$"),
        ("training: {hub_strategy: 5}\n", "training.hub_strategy: got 5, wanted end or every_save or .* or a string"),
    ],
)
def test_a_word_that_yaml_reads_as_no_text_is_refused_with_the_remedy(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL + text)


def test_columns_have_to_be_names(load):
    with pytest.raises(ConfigError, match=r"columns: got \{'text': False\}, wanted an object \(each value a string\)"):
        load(MINIMAL.replace("a.jsonl", "a.jsonl, columns: {text: no}"))


@pytest.mark.parametrize(
    "text", ["2024-01-01", "007", "1:30", "Q: {prompt}\n", "@file", "[abc", "%x", "!!set {a}", "#"]
)
def test_a_word_on_the_command_line_is_text_where_text_is_wanted(load, text):
    if "\n" not in text:
        assert load(MINIMAL, "--output", text).output == text
    template = "Q: {prompt}"
    assert load(MINIMAL, "--data.template", template).data.template == template


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("training: {max_steps: !!binary aGk=}\n", "could not determine a constructor for the tag .*binary"),
        ("training: {max_steps: !!set {a}}\n", "could not determine a constructor for the tag .*set"),
        ("seed: 1\nseed: 2\n", r"c\.yaml:5: not valid YAML: the key seed comes twice"),
        ("adapter: {r: 1, 'r': 2}\n", "the key r comes twice"),
        ("adapter: &a {rank_pattern: *a}\n", "an alias of what it is inside"),
        (f"adapter: {'[' * 100}{']' * 100}\n", "more than 32 levels"),
        ("seed: " + "9" * 5000 + "\n", "not valid YAML: Exceeds the limit"),
        ("seed: !!int many\n", "not valid YAML: invalid literal"),
        ('init_adapter: "a\\0b"\n', "a NUL character"),
        ('init_adapter: "a\\ud800b"\n', "surrogates not allowed"),
        ("? [a, b]\n: 3\n", "a key that is no word"),
        ("data.path: b.jsonl\n", r"'data\.path' \(write it as a field inside its section\)"),
        ("5: x\nnull: y\n", "unknown fields: 5; null"),
    ],
)
def test_yaml_that_is_more_than_plain_data_is_refused_in_one_line(load, yaml, message):
    with pytest.raises(FlashboneError, match=message) as error:
        load(MINIMAL + yaml)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_bomb_of_aliases_is_refused_at_once(load):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(FormatError, match="more than 20000 values"):
        load(MINIMAL + "\n".join(rows))


def test_a_file_that_no_configuration_is_as_large_as_is_refused(tmp_path):
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(FormatError, match="is larger than 1 MiB; a configuration was wanted"):
        load_recipe(tmp_path / "large.yaml")


def test_aliases_share_values_and_nothing_else(load):
    recipe = load(MINIMAL + "quantization: &few {bits: 4}\nrwkv: {}\nadapter: {rank_pattern: &p {a: 1}, r: 2}\n")
    assert recipe.quantization == {"bits": 4}
    both = load("model: m\noutput: o\ndata: {path: &p a.jsonl, eval: *p}\n", "--data.path", "b")
    assert (both.data.path, both.data.eval) == ("b", "a.jsonl")


def test_home_and_variables_are_filled_in_wherever_a_place_is_named(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("ROWS", "/rows")
    text = "model: ~/m\noutput: ${ROWS}/out\ndata: {path: $ROWS/a.jsonl, eval: ~/b.jsonl, template: '$ROWS {prompt}'}\n"
    recipe = load(
        text, "--init_adapter", "~/a", "--rwkv.vocabulary=$ROWS/v", "--training.chat_template_path", "~/t.jinja"
    )
    assert (recipe.model, recipe.output, recipe.init_adapter) == ("/home/me/m", "/rows/out", "/home/me/a")
    assert (recipe.data.path, recipe.data.eval, recipe.data.template) == (
        "/rows/a.jsonl",
        "/home/me/b.jsonl",
        "$ROWS {prompt}",
    )
    assert (recipe.rwkv, recipe.training) == ({"vocabulary": "/rows/v"}, {"chat_template_path": "/home/me/t.jinja"})
    files = 'training: {deepspeed: ~/ds.json, fsdp_config: $ROWS/f.json, accelerator_config: \'{"a": "$ROWS"}\'}'
    assert load(MINIMAL + files).training == {
        "deepspeed": "/home/me/ds.json",
        "fsdp_config": "/rows/f.json",
        "accelerator_config": '{"a": "$ROWS"}',
    }
    with pytest.raises(
        ConfigError,
        match=r"c\.yaml: model: \$NOWHERE_AT_ALL/m: the variable NOWHERE_AT_ALL is not set; set it, or write",
    ):
        load(MINIMAL, "--model", "$NOWHERE_AT_ALL/m")


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


def test_what_is_trained_along_adds_up(load):
    """A module that the checkpoint lacks and RWKV's LayerNorms are both saved."""
    recipe = load(MINIMAL + "adapter: {r: 4, modules_to_save: [own]}\n")
    config = adapter_config(
        recipe, {"modules_to_save": ["new"]}, {"modules_to_save": ["ln1", "new"], "parameters_to_save": ["time_decay"]}
    )
    assert (config.modules_to_save, config.parameters_to_save) == (["own", "new", "ln1"], ["time_decay"])
