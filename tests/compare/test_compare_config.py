"""What a comparison's configuration means, and what is refused."""

import pytest

from flashbone.compare.config import listed_methods, load_comparison
from flashbone.errors import ConfigError


def test_each_method_tries_the_common_rates_times_its_factor(config):
    tried = {
        one.label: one.learning_rates
        for one in listed_methods(load_comparison(config(methods=["lora", "full", "vera"])))
    }
    assert tried == {"lora": (1e-3, 1e-2), "full": (1e-4, 1e-3), "vera": (1e-2, 1e-1)}


def test_a_method_may_be_listed_twice_with_settings_and_rates_of_its_own(config):
    listed = [
        "lora",
        {"method": "lora", "lora_alpha": 3, "learning_rates": ["2e-2", 1e-4], "label": "Mine"},
        {"method": "bone", "dropout": 0.1},
    ]
    first, second, third = listed_methods(load_comparison(config(methods=listed)))
    assert (first.label, first.settings) == ("lora", {})
    assert (second.label, second.settings, second.learning_rates) == ("Mine", {"lora_alpha": 3}, (1e-4, 2e-2))
    assert third.label == "bone dropout=0.1"


def test_overrides_go_over_the_file(config):
    given = [
        "--methods",
        "[miss]",
        "--seeds=[5]",
        "--training.max_steps",
        "2",
        "--data.eval",
        "0.5",
        "--budget",
        "1000",
    ]
    comparison = load_comparison(config(), given)
    assert comparison.methods == ["miss"]
    assert comparison.seeds == [5]
    assert comparison.training["max_steps"] == 2
    assert comparison.data.eval == 0.5
    assert comparison.budget == 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["bone", "lora", "bone"]}, "bone is listed more than once"),
        ({"methods": ["bones"]}, "got method 'bones', wanted one of bone, mini"),
        ({"methods": []}, "is empty"),
        ({"methods": [{"lora": {}}]}, "got method None"),
        (
            {"methods": ["bone", {"method": "lora", "learning_rates": [1e-3]}]},
            "as many as any other, but got bone 2, lora 1",
        ),
        ({"learning_rates": [1e-3, 1e-3]}, r"yaml: learning_rates: got .* different positive numbers"),
        ({"methods": [{"method": "lora", "learning_rates": [0]}]}, r"yaml: methods\[0\]: learning_rates: got \[0\]"),
        ({"learning_rates": []}, "different positive numbers"),
        ({"seeds": [1, 1]}, "seeds: got"),
        ({"seeds": []}, "seeds: got"),
        ({"jobs": 0}, "jobs: got 0"),
        ({"tolerance": 3}, "tolerance: got 3"),
        ({"metric": "accuracy"}, "does not go with task sft"),
        ({"task": "classification", "metric": "loss"}, "does not go with task classification"),
        ({"metric": "f1"}, "metric"),
        ({"training": {"learning_rate": 1e-3}}, "set `learning_rates` instead"),
        (
            {"training": {"eval_strategy": "epoch", "eval_packing": True}},
            "training.eval_packing, training.eval_strategy: .*leave",
        ),
        ({"task": "classification", "rwkv": {"l2_wrap": True}}, "rwkv"),
        ({"adapter": {"r": 8}}, "unknown field: adapter"),
        ({"sedes": [1], "trainin": {}}, "unknown fields: sedes .*seeds.*trainin"),
        ({"answers": {"max_new_tokens": 0}}, "answers.max_new_tokens: got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(config, changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        load_comparison(config(**changes))
    assert "\n" not in str(error.value)
    assert "config.yaml" in str(error.value)


@pytest.mark.parametrize("part", ["eval", "test"])
def test_rows_to_hold_out_and_to_test_are_required(config, rows, part):
    data = {"path": str(rows / "train.jsonl"), "eval": 16, "test": 8, part: None}
    with pytest.raises(ConfigError, match=rf"data\.{part}"):
        load_comparison(config(data=data))


def test_test_rows_may_be_said_with_names_of_their_own(config, rows):
    part = {"path": str(rows / "test.jsonl"), "columns": {"prompt": "prompt"}}
    comparison = load_comparison(config(data={"path": str(rows / "train.jsonl"), "eval": 16, "test": part}))
    assert comparison.data.test == part
    for wrong, words in (({"path": "x", "eval": 3}, "data.test.eval"), ({"split": "test"}, "wanted a path")):
        with pytest.raises(ConfigError, match=words):
            load_comparison(config(data={"path": str(rows / "train.jsonl"), "eval": 16, "test": wrong}))
