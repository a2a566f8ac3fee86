"""A kilobyte that asks for minutes or gigabytes: refused in one line, within two seconds and 300 MiB."""

import contextlib
import importlib
import json
import re
import resource
import time

import peft
import pytest
import torch

from flashbone import BoneConfig
from flashbone.cli import main
from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import claims
from flashbone.files.fields import refuse_slow_patterns, settle_patterns
from flashbone.train import templates
from flashbone.train.arguments import trainer_arguments
from flashbone.train.data.formats import open_examples
from flashbone.train.data.tokens import Talk
from flashbone.train.recipe import DataRecipe, Recipe
from flashbone.train.templates import check_template
from flashbone.train.tokenizers import load_tokenizer, prompt_ids, training_tokenizer
from flashbone.tuner.model.whole import matches
from helpers.adapter_folders import tiny_llama, write_adapter
from helpers.tiny_llama import tiny_tokenizer, write_tiny_llama


@pytest.fixture(scope="module")
def imported():
    for name in ("transformers", "peft", "flashbone.evaluate.run", "flashbone.inspect.model"):
        importlib.import_module(name)


@pytest.fixture
def within_limits(imported):
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < 4  # two for the limit, two for what is right beside it
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


LARGE = [
    *({"num_hidden_layers": 20_000}, {"hidden_size": 10**9}, {"vocab_size": 10**400}, {"n_layer": 10**6}),
    *({"text_config": {"num_hidden_layers": 5000}}, {"a": {"b": {"intermediate_size": 1 << 30}}}),
    *({"num_labels": 10**8}, {"num_experts": 10**6}, {"num_attention_heads": 10**6}, {"x": 10**400}),
    *({"vision_config": {"image_size": 10**6}}, {"image_size": 1 << 14, "patch_size": 1}, {"depths": [2, 10**6]}),
    *({"max_position_embeddings": 10**9}, {"model_type": "gpt_neo", "max_position_embeddings": 10**6}),
    *({"hidden_size": 1e300}, {"max_source_positions": float("inf")}, {"hidden_sizes": [1 << 30]}),
]


@pytest.mark.parametrize("fields", LARGE)
def test_a_config_that_no_model_has_is_refused_before_it_is_built(tmp_path, capsys, within_limits, fields):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for command in (["inspect", str(tmp_path)], ["eval", str(tmp_path), "--perplexity", str(tmp_path / "rows.jsonl")]):
        assert main(command) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert "wanted at most" in line


def test_a_hidden_size_that_the_weights_could_not_hold_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    claims.check(tmp_path / "config.json", {"hidden_size": 64, "vocab_size": 32_000})
    with pytest.raises(ValueError, match=r"hidden_size: got 10,000, but the weights beside it have only 1,000 bytes"):
        claims.check(tmp_path / "config.json", {"hidden_size": 10_000})
    for name in ("vocab_size", "intermediate_size", "max_position_embeddings"):
        with pytest.raises(ValueError, match=rf"{name}: got 9,000,000 with a hidden size of 64, but the weights"):
            claims.check(tmp_path / "config.json", {"text_config": {"hidden_size": 64, name: 9_000_000}})


def test_a_config_that_is_nested_deeply_is_refused(tmp_path):
    config: dict = {}
    for _ in range(200):
        config = {"a": config}
    with pytest.raises(ValueError, match="is nested more than 8 deep"):
        claims.check(tmp_path / "config.json", config)


@pytest.mark.slow
def test_every_config_of_transformers_is_within_the_limits(tmp_path):
    """As it is without settings."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wrong, tried = {}, 0
    for name in CONFIG_MAPPING:
        with contextlib.suppress(Exception):
            fields = CONFIG_MAPPING[name]().to_dict()
            tried += 1
            try:
                claims.check(tmp_path / "config.json", fields)
            except FormatError as error:
                wrong[name] = str(error)
    assert wrong == {}
    assert tried > 200


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{{ lipsum(n=10 ** 7) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_does_not_end_is_refused(within_limits, template):
    with pytest.raises(ConfigError, match=r"the chat template takes more than 2 seconds or 300 MiB"):
        check_template(tiny_tokenizer(template), "m")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WAITS = f"{{% if messages | length > 2 %}}{ENDLESS}{{% endif %}}"


def test_a_template_that_waits_for_more_turns_is_stopped_where_it_is_rendered(monkeypatch, within_limits):
    monkeypatch.setattr(templates, "RENDERING", 0.5)
    tokenizer = tiny_tokenizer(WAITS)
    check_template(tokenizer, "m")
    messages = [{"role": "user", "content": "a"}] * 3
    with pytest.raises(templates.TooSlow, match=r"the chat template takes more than 0.5 seconds"):
        Talk(messages, [False] * 3, tokenizer, {}).written(messages)
    with pytest.raises(templates.TooSlow):
        prompt_ids(tokenizer, messages)


def test_a_row_brings_no_template_of_its_own():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(FormatError, match="'chat_template_kwargs' has chat_template, which rows cannot set"):
        list(open_examples([("x:1", row | {"chat_template_kwargs": {"chat_template": WAITS}})], "sft", "x").examples)


@pytest.mark.parametrize(
    "damage", [b"{}", b"null", b"[" * 5000, b'{"model": {"type": "WordLevel", "vocab": {"a": 1}}}']
)
def test_a_damaged_tokenizer_is_named_in_plain_words(tmp_path, damage):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(FlashboneError, match=r"model .*: (could not be loaded|its files cannot be read)") as caught:
        load_tokenizer(str(tmp_path))
    assert "bug" not in str(caught.value)


@pytest.mark.parametrize("template", ["{% for", "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "a" * 300_000])
def test_a_template_that_cannot_be_used_is_refused_in_one_line(template):
    with pytest.raises(ConfigError, match="chat template") as caught:
        check_template(tiny_tokenizer(template), "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a" * 300_000, "a chat template has to be text of at most"),
        (b"{% for", "the chat template cannot be used"),
        (b"\xff\xfe{", "not UTF-8 text; save it as UTF-8"),
    ],
)
def test_a_template_beside_an_adapter_or_in_a_recipe_is_tried_as_a_models_is(tmp_path, content, problem):
    """An adapter's folder may hold a template and no tokenizer."""
    write_tiny_llama(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"chat_template\.jinja: {problem}"):
        load_tokenizer(str(tmp_path / "base"), adapters=[adapter])
    recipe = Recipe(str(tmp_path / "base"), DataRecipe("rows.jsonl"), "out")
    recipe.training["chat_template_path"] = str(adapter / "chat_template.jinja")
    args = trainer_arguments(recipe)
    with pytest.raises(ConfigError, match=rf"chat_template\.jinja: {problem}"):
        training_tokenizer(recipe, args, None, True)


def test_usual_templates_are_taken():
    check_template(tiny_tokenizer(), "m")
    check_template(tiny_tokenizer(None), "m")
    check_template(tiny_tokenizer("{{ raise_exception('a system turn is needed') }}"), "m")


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(a+)+$"},
        {"rank_pattern": {"(x+x+)+y": 4}},
        {"rank_pattern": {f"q{n}": 4 for n in range(9**5)}},
    ],
    ids=["endless", "endless pattern", "many"],
)
def test_patterns_that_never_end_are_refused_by_the_commands(tmp_path, capsys, within_limits, command, fields):
    folder = write_adapter(tmp_path / "a", "bone", {"a" * 60 + "b": torch.ones(4, 8)}, **fields)
    rest = [] if command == "inspect" else [str(tmp_path / "out"), "--to", "miss"]
    assert main([command, str(folder), *rest]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 540


SLOW = ".*".join("abcdef") + "x"  # five repeats, which Python's matcher tries in all orders


def test_patterns_of_other_methods_mean_the_same_and_end(within_limits):
    names = ["a" + "b" * 40 + "c" + "d" * 40 + "e" + "f" * n for n in range(200)] + ["abcdefx"]
    config = peft.LoraConfig(target_modules=SLOW, exclude_modules="b.*", rank_pattern={"def.*x": 3, f"{SLOW}": 4})
    settle_patterns(config, names)
    assert [name for name in names if re.fullmatch(config.target_modules, name)] == ["abcdefx"]
    assert config.exclude_modules == "b.*"
    assert config.rank_pattern == {"abcdefx": 4}


def test_names_of_saved_modules_that_never_end_as_patterns_are_refused(tmp_path, capsys, within_limits):
    folder = write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)}, modules_to_save=["(a+)+$"])
    assert main(["inspect", str(folder)]) == 1
    assert "modules_to_save" in capsys.readouterr().err
    for fields in ({"modules_to_save": ["(a+)+$"]}, {"layers_pattern": ["(a+)+$"]}, {"alpha_pattern": {"(a+)+$": 1}}):
        with pytest.raises(FormatError, match="could take forever"):
            refuse_slow_patterns(tmp_path, fields)
    with pytest.raises(ConfigError, match=r"modules_to_save: .* could take forever"):
        BoneConfig(modules_to_save=["(a+)+$"])


def test_a_pattern_of_a_bone_adapter_is_matched_in_bounded_time(within_limits):
    assert not matches(BoneConfig(target_modules=SLOW), "a" + "bcde" * 60)
    assert matches(BoneConfig(target_modules=SLOW), "abcdefx")
    assert not matches(BoneConfig(target_modules=SLOW, exclude_modules=r".*f.*"), "abcdefx")


def test_a_header_of_many_axes_is_refused(tmp_path, capsys, within_limits):
    folder = write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)})
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert main(["inspect", str(folder)]) == 1
    assert "tensor a has 100000 axes, at most 64" in capsys.readouterr().err
