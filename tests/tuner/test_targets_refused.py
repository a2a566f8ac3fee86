"""Targets that mean nothing, or not what they seem to: the error names what there is."""

import pytest
from peft import get_peft_model
from targeted_models import Unknown, adapted, config
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.model.model import TargetError
from flashbone.tuner.model.targets import resolved
from helpers.families import FAMILIES


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "bert",
            ["mlp.gate", "attention.query"],
            "target_modules: this model has no layer with the role 'mlp.gate'; it has attention.query, attention.key,"
            " attention.value, attention.output, mlp.up, mlp.down",
        ),
        (
            "mixtral",
            ["mlp.gate", "all-mlp", "intermediate"],
            "target_modules: this model has no layer with the roles 'all-mlp', 'intermediate', 'mlp.gate'; it has"
            " attention.query, attention.key, attention.value, attention.output",
        ),
    ],
)
def test_a_role_that_the_model_lacks_is_named_with_those_it_has(family, targets, message):
    model, wanted = FAMILIES[family].make(), config(*targets)
    for attempt in (resolved, get_peft_model):
        with pytest.raises(TargetError) as caught:
            attempt(model, wanted)
        assert str(caught.value) == message
        assert wanted.target_modules == set(targets)
    assert not adapted(model)


def test_without_any_role_the_error_names_the_linear_layers():
    with pytest.raises(TargetError) as caught:
        get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), config("all-attention"))
    assert str(caught.value) == (
        "target_modules: this model has no layer with the role 'all-attention'; nor with any other; its linear layers"
        " end in: 0, 2"
    )


def test_what_is_neither_name_nor_role_is_left_to_peft():
    model = FAMILIES["llama"].make()
    assert len(resolved(model, config("attention.output", "typo"))) == 2
    wanted = config("typo")
    with pytest.raises(TargetError, match=r"not found in the base model.*Linear layers of this model end in: q_proj"):
        get_peft_model(model, wanted)
    assert wanted.target_modules == {"typo"}


def test_a_name_of_a_module_that_cannot_be_adapted_says_so():
    wanted = config("query", "intermediate")
    for attempt in (resolved, get_peft_model):
        with pytest.raises(ConfigError, match="query: target module cannot be adapted, it is an EmbeddingBag"):
            attempt(Unknown(), wanted)
        assert wanted.target_modules == {"query", "intermediate"}


def test_a_role_of_which_nothing_is_left_is_an_error():
    for fields in ({"layers_to_transform": [7]}, {"exclude_modules": r".*"}):
        wanted = config("mlp.down", **fields)
        assert resolved(FAMILIES["bert"].make(), wanted) == []
        with pytest.raises(TargetError, match="Linear layers of this model end in"):
            get_peft_model(FAMILIES["bert"].make(), wanted)
        assert wanted.target_modules == {"mlp.down"}


@pytest.mark.parametrize("fields", [{"exclude_modules": ["attention.query"]}, {"rank_pattern": {"attention.query": 2}}])
def test_roles_in_other_fields_are_refused_with_the_names_to_use(fields):
    model, (field,) = FAMILIES["llama"].make(), fields
    message = f"{field}: 'attention.query' is a role, which only target_modules takes; name its layers, .* q_proj$"
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, config("all-attention", **fields))
    assert not adapted(model)
