"""Names of a live model found again in its checkpoint."""

import re
from pathlib import Path

import pytest

from flashbone.files import names

ENCODER = ["embeddings.weight", "encoder.0.q.weight", "encoder.1.q.weight"]


def test_exact_names_are_taken_first():
    stored = ["a.q.weight", "model.a.q.weight", "b.a.q.weight"]
    assert names.locate(["a.q.weight"], stored) == ({"a.q.weight": "a.q.weight"}, {})


def test_a_base_model_prefix_is_dropped_or_added():
    wanted = ["bert.encoder.0.q.weight", "bert.encoder.1.q.weight"]
    found, lost = names.locate(wanted, ENCODER)
    assert found == dict(zip(wanted, ENCODER[1:], strict=True))
    assert not lost
    found, lost = names.locate(ENCODER[1:], [f"bert.{name}" for name in ENCODER])
    assert found == {name: f"bert.{name}" for name in ENCODER[1:]}
    assert not lost


def test_a_dropped_prefix_is_one_whatever_comes_after_it():
    stored = ["encoder.q.weight", "pooler.q.weight"]
    found, lost = names.locate([f"bert.{name}" for name in stored], stored)
    assert found == {f"bert.{name}": name for name in stored}
    assert not lost
    stored = ["encoder.q.weight", "bert.pooler.q.weight"]  # one would be dropped, one added
    found, lost = names.locate(["bert.encoder.q.weight", "pooler.q.weight"], stored)
    assert not found
    assert all("but other names differ by another prefix" in reason for reason in lost.values())


def test_unknown_names_are_all_returned():
    found, lost = names.locate(["x.q.weight", "encoder.0.q.weight", "y.weight"], ENCODER)
    assert set(found) == {"encoder.0.q.weight"}
    assert lost == {"x.q.weight": "not in the base", "y.weight": "not in the base"}


def test_ambiguous_names_are_not_guessed():
    _, lost = names.locate(["encoder.0.q.weight"], ["text.encoder.0.q.weight", "vision.encoder.0.q.weight"])
    assert "text.encoder.0.q.weight, vision.encoder.0.q.weight" in lost["encoder.0.q.weight"]


def test_one_prefix_holds_for_all_names():
    stored = ["text.encoder.0.q.weight", "vision.encoder.1.q.weight"]
    found, lost = names.locate(["encoder.0.q.weight", "encoder.1.q.weight"], stored)
    assert not found
    assert len(lost) == 2


@pytest.mark.parametrize(
    ("tensor", "config", "transposed"),
    [
        ("h.0.attn.c_proj.weight", {"model_type": "gpt2"}, True),
        ("h.0.mlp.c_fc.weight", {"model_type": "openai-gpt"}, True),
        ("lm_head.weight", {"model_type": "gpt2"}, False),
        ("h.0.attn.c_attn.weight", {"model_type": "gpt_bigcode"}, False),
        ("h.0.attn.c_attn.weight", {}, None),
        ("layers.0.q_proj.weight", {}, False),
        ("decoder.h.0.attn.c_attn.weight", {"model_type": "x", "decoder": {"model_type": "gpt2"}}, True),
        ("encoder.h.0.attn.c_attn.weight", {"model_type": "x", "decoder": {"model_type": "gpt2"}}, False),
    ],
)
def test_transposed_layers_are_known_by_model_type_and_name(tensor, config, transposed):
    assert names.is_transposed(tensor, config) is transposed


def test_the_list_of_transposed_layers_is_that_of_transformers():
    import transformers

    folders, layers = set(), set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        found = re.findall(r"self\.(\w+) = Conv1D\(", file.read_text(encoding="utf-8"))
        layers.update(found)
        folders.update([file.parent.name] if found else [])
    types = {"openai" if name == "openai-gpt" else name.removesuffix("_decoder") for name in names.CONV1D_TYPES}
    assert folders == types
    assert layers == set(names.CONV1D_LAYERS)


@pytest.mark.parametrize(
    ("config", "stored", "tied"),
    [
        ({"tie_word_embeddings": True}, ["lm_head.weight"], True),
        ({"tie_word_embeddings": False}, ["wte.weight"], False),
        ({"text_config": {"tie_word_embeddings": False}}, ["wte.weight"], False),
        ({}, ["model.embed_tokens.weight"], True),
        ({}, ["model.embed_tokens.weight", "lm_head.weight"], False),
    ],
)
def test_tied_embeddings_are_told_by_the_config_or_by_a_head_that_is_missing(config, stored, tied):
    assert names.has_tied_embeddings(config, stored) is tied
