"""Rewards for answers: the named ones, a function from the command line, never from a recipe; and runs of grpo."""

import json
from pathlib import Path

import pytest
from training_runs import config_file, metrics_of, recipe_for, stop_at

from flashbone.cli import main
from flashbone.errors import ConfigError, FlashboneError
from flashbone.train.plan import plan
from flashbone.train.recipe import load_recipe
from flashbone.train.rewards import Rewards, load_reward
from flashbone.train.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]


def rewards_of(texts, answers, **named):
    ids = [text.split() for text in texts]
    functions = Rewards(**named).functions()
    return [f(prompts=texts, completions=texts, completion_ids=ids, answer=answers) for f in functions]


def test_named_rewards_are_numbers_for_each_answer():
    texts, answers = ["2 + 3 is 5", "#### 6", "it is six six six six six six"], ["#### 5", "5", "six"]
    right, found, short = rewards_of(texts, answers, exact_match=True, regex="#+ [0-9]", length=4)
    assert right == [1, 0, 0]
    assert found == [0, 1, 0]
    assert short == [0.75, 1, 0]


def test_an_answer_may_be_a_turn():
    function = Rewards(exact_match=True).functions()[0]
    assert function(completions=[[{"role": "assistant", "content": "on the mat."}]], answer=["on the mat"]) == [1]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"regex": "(a+)+b"}, r"rewards.regex: '\(a\+\)\+b' is a regular expression that could take forever"),
        ({"regex": "("}, r"rewards.regex: '\(' is not a regular expression"),
        ({"length": 0}, "rewards.length: got 0, wanted a number of tokens"),
    ],
)
def test_a_wrong_reward_is_one_line(rewards, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(**rewards)


NAMES_CODE = [
    "rewards: {a.py:f: 1}",
    "rewards: a.py:f",
    "rewards: [a.py:f]",
    "reward: a.py:f",
    "rewards: {regex: a.py:f}",
]


@pytest.mark.parametrize("line", NAMES_CODE)
def test_a_recipe_that_names_a_python_file_is_refused(tmp_path, line):
    (tmp_path / "a.py").write_text("raise SystemExit('run')\n")
    config = tmp_path / "c.yaml"
    config.write_text(f"model: m\noutput: o\ntask: grpo\ndata: {{path: d.jsonl}}\n{line}\n")
    with pytest.raises(ConfigError, match="a recipe runs no code; name the function on the command line: --reward"):
        load_recipe(config)


def test_rewards_of_another_task_are_refused(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\noutput: o\ndata: {path: d.jsonl}\nrewards: {exact_match: true}\n")
    with pytest.raises(ConfigError, match="rewards: are for task grpo, not sft"):
        load_recipe(config)


CODE = """
def cats(completions, **more):
    return [float("cat" in str(text)) for text in completions]

def short(completions, **more):
    return [1.0]

def broken(**more):
    return 1 / 0
"""


@pytest.fixture
def code(tmp_path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(CODE)
    return path


def test_a_function_of_a_file_gives_rewards(code):
    cats = load_reward(f"{code}:cats")
    assert cats(prompts=["a", "b"], completions=["cat", "dog"], answer=["", ""]) == [1, 0]
    assert cats.__name__ == "cats"
    with pytest.raises(FlashboneError, match=r"rewards\.py:short: wanted a list of 2 numbers"):
        load_reward(f"{code}:short")(prompts=["a", "b"], completions=["cat", "dog"])
    with pytest.raises(FlashboneError, match=r"rewards\.py:broken: ZeroDivisionError: division by zero"):
        load_reward(f"{code}:broken")(prompts=["a"], completions=["cat"])
    for named, message in (("none.py:cats", "no such file"), (f"{code}:dogs", "has no function dogs")):
        with pytest.raises(ConfigError, match=message):
            load_reward(named)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "rows.jsonl"
    asked = [f"where was the {size} {animal} ?" for size in ("big", "small") for animal in ("cat", "dog")] * 5
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "on the mat"} for text in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def grpo(llama, prompts, output, **changes):
    training = {"max_steps": 3, "logging_steps": 1, "save_steps": 1, "eval_strategy": "no", "max_completion_length": 6}
    training |= {"num_generations": 4, **changes.pop("training", {})}
    return recipe_for(llama, prompts, output, task="grpo", training=training, samples=0, **changes)


@pytest.mark.slow
def test_a_stopped_run_of_grpo_resumes_to_the_same_figures(llama, prompts, tmp_path, monkeypatch):
    rewards = {"exact_match": True, "regex": "cat|dog", "length": 3}
    weighted = {"training": {"reward_weights": [1, 0.5, 0.1]}, "rewards": rewards}
    whole = train(grpo(llama, prompts, tmp_path / "whole", **weighted))
    stop_at(3, grpo(llama, prompts, tmp_path / "run", **weighted), monkeypatch)
    train(grpo(llama, prompts, tmp_path / "run", **weighted), resume=True)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert {f"rewards/{name}/mean" for name in rewards} < metrics_of(tmp_path / "whole")[1].keys()
    assert whole.summary["steps"] == 3
    assert plan(grpo(llama, prompts, tmp_path / "dry", **weighted)).steps == 3


def test_the_command_line_names_a_function(llama, prompts, code, tmp_path, capsys):
    recipe = grpo(llama, prompts, tmp_path / "run", training={"eval_strategy": "steps", "max_steps": 1})
    config = str(config_file(recipe, tmp_path / "grpo.yaml"))
    assert main(["train", config]) == 1
    assert "rewards: task grpo needs some: exact_match: true" in capsys.readouterr().err
    assert main(["train", config, "--reward", f"{code}:cats"]) == 0
    assert "held-out reward, before -> after" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_reward_after"] is not None
    (tmp_path / "run" / "summary.json").unlink()
    code.write_text(CODE.replace("cat", "mat"))
    assert main(["train", config, "--resume", "--reward", f"{code}:mats"]) == 1
    assert "changed since its run began: the file of --reward" in capsys.readouterr().err
    sft = str(config_file(recipe_for(llama, prompts, tmp_path / "sft"), tmp_path / "sft.yaml"))
    assert main(["train", sft, "--reward", f"{code}:mats"]) == 1
    assert "--reward: is for task grpo, not sft" in capsys.readouterr().err
