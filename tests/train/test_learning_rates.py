"""`training.learning_rates`: groups of parameters that learn at rates of their own."""

import logging

import pytest
from training_runs import kill_at_step_seven, metrics_of, recipe_for

from flashbone.errors import ConfigError
from flashbone.train.arguments import trainer_arguments
from flashbone.train.data.loading import load_data
from flashbone.train.run import train
from flashbone.train.trainers import build_trainer

RATES = {"lm_head": 1e-4, "mlp.*": 5e-4, r"layers\.1": 0.0}


def prepared(recipe):
    args = trainer_arguments(recipe)
    args.max_length = 64
    return build_trainer(recipe, args, load_data(recipe))[0]


@pytest.fixture
def recipe(llama, questions_file, tmp_path):
    def make(output="run", **changes):
        changes = {"samples": 0, "adapter": {"r": 8, "modules_to_save": ["lm_head"]}, **changes}
        return recipe_for(llama, questions_file, tmp_path / output, **changes)

    return make


def test_each_group_has_its_rate_and_the_schedule_applies_to_all(recipe, caplog):
    caplog.set_level(logging.INFO, "flashbone")
    trainer = prepared(recipe(training={"learning_rates": RATES, "lr_scheduler_type": "linear", "use_cpu": True}))
    trainer.create_optimizer_and_scheduler(10)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}

    def rates():
        return {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}

    before = rates()
    assert len(before) == sum(p.requires_grad for p in names)
    for name, rate in before.items():
        wanted = 1e-4 if "lm_head" in name else 5e-4 if ".mlp." in name else 0.0 if "layers.1." in name else 5e-3
        assert rate == wanted, name
    assert len(set(before.values())) == 4
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates() == pytest.approx({name: rate / 2 for name, rate in before.items()})
    said = [record.message for record in caplog.records if record.message.startswith("learning rates:")]
    assert len(said) == 1
    assert "0.0005 for mlp.* (" in said[0]
    assert "0.005 for all others (" in said[0]


@pytest.mark.slow
def test_one_group_at_the_common_rate_trains_to_the_same_losses(recipe):
    training = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "no", "use_cpu": True}
    train(recipe("plain", training=training))
    train(recipe("grouped", training={**training, "learning_rates": {"mlp": 5e-3}}))
    train(recipe("other", training={**training, "learning_rates": {"mlp": 5e-2}}))
    plain, grouped, other = (
        [row["loss"] for row in metrics_of(recipe(name).output) if "loss" in row]
        for name in ("plain", "grouped", "other")
    )
    assert grouped == pytest.approx(plain, rel=1e-5)
    assert other[-1] != pytest.approx(plain[-1], rel=1e-3)


@pytest.mark.slow
def test_a_killed_run_with_groups_resumes_to_the_same_losses(recipe, tmp_path):
    training = {"learning_rates": RATES, "use_cpu": True, "save_steps": 3, "save_strategy": "steps"}
    whole, killed = recipe("whole", training=training), recipe("killed", training=training)
    train(whole)
    kill_at_step_seven(killed, tmp_path)
    with pytest.raises(ConfigError, match=r"training\.learning_rates was .*; resume with the same one"):
        train(recipe("killed", training={**training, "learning_rates": {"mlp": 1e-4}}), resume=True)
    train(killed, resume=True)
    assert metrics_of(killed.output) == metrics_of(whole.output)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"mpl": 1e-3, "lm_head": 1e-4}, r"learning_rates: 'mpl' matches no trained parameter"),
        ({"mlp": 1e-3, r"mlp\.up_proj": 1e-4}, r"'mlp\\\\.up_proj' matches no .* or only those of a pattern before"),
        ({"embed_tokens": 1e-3}, "'embed_tokens' matches no trained parameter"),
        ({"(a+)+b": 1e-3}, "could take forever"),
        ({"mlp(": 1e-3, "attn": -1.0}, r"'mlp\(' is not a regular expression .*; 'attn': got -1\.0, wanted 0 or more"),
        ({"mlp": float("nan")}, "wanted 0 or more"),
    ],
)
def test_what_a_pattern_cannot_mean_is_refused_by_name(recipe, rates, message):
    with pytest.raises(ConfigError, match=message):
        prepared(recipe(training={"learning_rates": rates, "use_cpu": True}))
