"""`flashbone schema`: what editors hold recipes against is what the commands take."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from flashbone import cli
from flashbone.cli.schema import schema_of
from flashbone.compare.config import load_comparison
from flashbone.errors import FlashboneError
from flashbone.files.plain_yaml import parse_yaml, read_yaml
from flashbone.train.recipe import load_recipe
from helpers.json_schema import problems

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "examples" / "schemas"
READERS = {"train": load_recipe, "compare": load_comparison}
RECIPES = {
    path: "compare" if path.parent.name == "compare" else "train"
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if not {"accelerate", "clusters"} & {*path.parts}
}
RIGHT = """\
model: m
data: {path: a.jsonl, columns: {prompt: q}, eval: 5}
adapter: {variant: bat-col, r: 16, target_modules: [q_proj, v_proj], rank_pattern: {down: 8}}
training: {max_steps: 3, learning_rate: 2e-4, eval_strategy: no, lr_scheduler_type: cosine, report_to: [none]}
output: o
"""
# A change of it each: the top-level fields that are put in place; null takes one away.
WRONG = [
    *("{model: null}", "{model: 3}", "{data: null}", "{output: []}", "{outputs: o}", "{task: sfd}", "{seed: now}"),
    *("{data: {}}", "{data: {path: a, sources: b}}", "{data: {path: a, turns: first}}", "{data: {path: a, evals: 5}}"),
    *("{data: []}", "{data: [{weight: 2}]}", "{samples: few}"),
    *("{adapter: {rr: 8}}", "{adapter: {task_type: X}}", "{adapter: [r, 8]}"),
    *("{training: {max_stps: 3}}", "{training: {max_steps: many}}"),
    *("{training: {output_dir: x}}", "{training: {bf16: maybe}}", "{early_stopping: {min_delta: 0.1}}"),
    *("{quantization: {bits: 3}}", "{rwkv: {train_parts: [lm]}}", "{task: classification, training: {packing: true}}"),
]
LATER = [  # what a run refuses after its recipe has been read
    "{data: {path: a, format: alpacca}}",
    "{adapter: {variant: bad-col}}",
    "{training: {lr_scheduler_type: cosinus}}",
]
RIGHT_TOO = [
    "{}",
    "{data: [a.jsonl, {path: b.jsonl, weight: 2}]}",
    "{data: {sources: [a.jsonl]}, merge: true}",
    "{task: classification, training: {max_length: 99}}",
    "{training: null, early_stopping: {patience: 3}, rwkv: {train_parts: [ln]}}",
]


@pytest.fixture(scope="module")
def schemas():
    return {name: schema_of(name) for name in READERS}


def changed(change):
    recipe = parse_yaml(RIGHT, "") | parse_yaml(change, "")
    return {key: value for key, value in recipe.items() if value is not None or key == "training"}


def judged(change, schema, tmp_path):
    """What the schema has against a changed recipe, and what the command has."""
    recipe = changed(change)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    try:
        load_recipe(file)
        refused = ""
    except FlashboneError as error:
        refused = str(error)
    return list(problems(recipe, schema, schema)), refused


@pytest.mark.parametrize("change", WRONG)
def test_what_a_run_refuses_breaks_the_schema(change, schemas, tmp_path):
    against, refused = judged(change, schemas["train"], tmp_path)
    assert refused
    assert against


@pytest.mark.parametrize("change", LATER)
def test_words_that_a_run_does_not_know_break_the_schema(change, schemas, tmp_path):
    assert judged(change, schemas["train"], tmp_path)[0]


@pytest.mark.parametrize("change", RIGHT_TOO)
def test_what_a_run_takes_fits_the_schema(change, schemas, tmp_path):
    assert judged(change, schemas["train"], tmp_path) == ([], "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_an_example_names_its_schema_and_fits_it(path, schemas):
    name = RECIPES[path]
    first = path.read_text().partition("\n")[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == SCHEMAS / f"{name}.json"
    assert list(problems(read_yaml(path), schemas[name], schemas[name])) == []
    READERS[name](path)


@pytest.mark.parametrize("name", READERS)
def test_the_schema_beside_the_examples_is_what_the_command_prints(name, schemas, capsys):
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    if other := [
        package for package in ("trl", "transformers", "peft") if metadata.version(package) != pinned[package]
    ]:
        pytest.skip(f"it is written with the pinned {', '.join(other)}")
    assert cli.main(["schema", name]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == schemas[name]
    written = (SCHEMAS / f"{name}.json").read_text()
    assert written == printed, f"write it again: flashbone schema {name} > examples/schemas/{name}.json"


def test_jsonschema_agrees(schemas):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    for name, schema in schemas.items():
        jsonschema.Draft7Validator.check_schema(schema)
        for path in (path for path in RECIPES if RECIPES[path] == name):
            jsonschema.validate(read_yaml(path), schema)
    for change in [*WRONG, *LATER]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(change), schemas["train"])


def test_fields_have_descriptions(schemas):
    notes = schemas["train"]["definitions"]
    assert notes["data.turns"]["description"] == "which answers of a conversation are learned"
    assert notes["adapter.dropout"]["description"].startswith("Probability with which entries of the input are dropped")
    assert notes["training.max_steps"]["description"]
    without = [name for name, entry in notes.items() if "." in name and "description" not in entry]
    assert len(without) < 12, without
