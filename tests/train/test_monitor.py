"""What is logged about rotations: in the trainer's log, in metrics.jsonl, in the plot; and for which variants."""

import json
import math

import pytest
import torch
from peft import BoneConfig, get_peft_model
from training_runs import recipe_for
from transformers import Trainer, TrainerCallback, TrainingArguments

from flashbone import variants
from flashbone.errors import NonFiniteError
from flashbone.ops.rotation import orthogonality_error, rotation_angle_deg
from flashbone.train.monitor import RotationMonitor, trained_rotations
from flashbone.train.report import plot_losses, plot_rotations
from flashbone.train.run import train
from helpers.adapter_folders import tiny_bert
from helpers.tiny_llama import questions

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]

KEYS = ("rotation/error", "rotation/angle_deg", "rotation/grad_norm")
QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
ROWS = [{"input_ids": [1, 2, 3 + i, 4], "labels": i % 2} for i in range(8)]


class Reporter(TrainerCallback):
    """As those of TensorBoard and others: it takes what is in the log when its turn comes."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def trainer_for(folder, config: BoneConfig, **arguments) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), config)
    fields = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.05, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(folder), use_cpu=True, save_strategy="no", **fields | arguments)
    return Trainer(model, args, train_dataset=ROWS, callbacks=[Reporter()])


def q(variant, P) -> torch.Tensor:
    return variant.offset(P).double() + torch.eye(len(P))


@pytest.mark.parametrize("fields", [{}, {"orthogonal_eps": 1e-2}, {"use_orthogonal": False}], ids=str)
def test_every_training_log_has_the_figures_of_each_module_and_the_largest(fields, tmp_path):
    trainer = trainer_for(tmp_path, BoneConfig(bottleneck_size=4, target_modules=["query"], **fields))
    RotationMonitor.attach(trainer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3
    for row in logged:
        assert {key for key in row if key.startswith("rotation")} == {
            name for key in KEYS for name in (key, *(f"{key}/{module}" for module in QUERIES))
        }
        assert all(row[key] == max(row[f"{key}/{module}"] for module in QUERIES) for key in KEYS)
    blocks = trained_rotations(trainer.model)
    assert list(blocks) == QUERIES
    for name, (variant, P) in blocks.items():
        Q = q(variant, P.detach())
        assert logged[-1][f"rotation/error/{name}"] == pytest.approx(orthogonality_error(Q), rel=1e-3)
        assert logged[-1][f"rotation/angle_deg/{name}"] == pytest.approx(rotation_angle_deg(Q), rel=5e-3)
    assert (logged[-1]["rotation/error"] > 0.01) == (fields == {"use_orthogonal": False})
    assert logged[-1]["rotation/angle_deg"] > logged[0]["rotation/angle_deg"] > 0
    reporter = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Reporter))
    assert [row["rotation/error"] for row in reporter.seen if "loss" in row] == [r["rotation/error"] for r in logged]


def test_the_norm_is_that_of_the_gradient_which_the_optimiser_gets(tmp_path):
    trainer = trainer_for(
        tmp_path,
        BoneConfig(bottleneck_size=4, target_modules=["query"]),
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=len(ROWS),
    )
    RotationMonitor.attach(trainer, per_module=False)
    model = trainer.model.eval()
    batch = {key: torch.tensor([row[key] for row in ROWS]) for key in ROWS[0]}
    model(**batch).loss.backward()
    want = max(float(P.grad.norm()) for _, P in trained_rotations(model).values())
    model.zero_grad()
    for module in model.modules():  # no dropout in the trainer's step either
        module.train = lambda mode=True, module=module: module
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["rotation/grad_norm"] == pytest.approx(want, rel=1e-3)
    assert {key for key in row if key.startswith("rotation")} == set(KEYS)


def test_the_largest_of_figures_with_nan_is_nan():
    monitor, variant = RotationMonitor(), variants.get("orthogonal")
    for broken in ("a", "b"):  # whichever comes last
        monitor._blocks = {name: (variant, torch.zeros(2, 2)) for name in "ab"}
        monitor._gradients = {name: torch.tensor(torch.nan if name == broken else 0.5) for name in "ab"}
        figures = monitor._measure()
        assert math.isnan(figures["rotation/grad_norm"])
        assert figures["rotation/angle_deg"] == 0


@pytest.mark.parametrize("use_orthogonal", [True, False])
def test_a_run_that_diverges_says_so_in_spite_of_the_monitor(use_orthogonal, llama, jsonl, tmp_path):
    adapter = {"bottleneck_size": 8, "use_orthogonal": use_orthogonal, "target_modules": ["o_proj"]}
    training = {"max_steps": 3, "learning_rate": 1e38, "max_grad_norm": 0.0}
    recipe = recipe_for(llama, jsonl(questions(40)), tmp_path / "run", adapter=adapter, training=training)
    with pytest.raises(NonFiniteError, match=r"step \d: (eval_)?loss is (nan|inf); lower training.learning_rate"):
        train(recipe)


def test_frozen_rotations_and_other_variants_are_not_watched(tmp_path):
    trainer = trainer_for(tmp_path, BoneConfig(r=4, target_modules=["query"]))
    trainer.model.add_adapter("frozen", BoneConfig(bottleneck_size=4, target_modules=["query"]))
    assert trained_rotations(trainer.model) == {}
    RotationMonitor.attach(trainer)
    trainer.train()
    assert not any("rotation" in key for row in trainer.state.log_history for key in row)


@pytest.mark.slow
def test_flashbone_train_logs_and_draws_rotations(llama, jsonl, tmp_path):
    file = jsonl(questions(40))
    adapter = {"bottleneck_size": 8, "target_modules": ["o_proj", "down_proj"]}
    runs = {name: tmp_path / name for name in ("watched", "unwatched", "bone")}
    training = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no"}
    summary = train(recipe_for(llama, file, runs["watched"], adapter=adapter, training=training)).summary
    train(recipe_for(llama, file, runs["unwatched"], adapter=adapter, training=training, monitor=False))
    train(recipe_for(llama, file, runs["bone"], training=training))
    rows = {
        name: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for name, folder in runs.items()
        if folder.exists()
    }
    watched = [row for row in rows["watched"] if "loss" in row]
    assert [row["step"] for row in watched] == [1, 2, 4]
    assert all(set(KEYS) <= set(row) for row in watched)
    assert "rotation/error/model.layers.1.mlp.down_proj" in watched[0]
    assert summary["rotation"] == {key.partition("/")[2]: watched[-1][key] for key in KEYS}
    assert summary["rotation"]["error"] < 3e-6
    picture = plot_rotations(runs["watched"] / "metrics.jsonl", tmp_path / "rotation.png")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot_losses(runs["watched"] / "metrics.jsonl", tmp_path / "loss.png").stat().st_size > 10_000
    losses = {name: [row["loss"] for row in rows[name] if "loss" in row] for name in rows}
    assert losses["watched"] == losses["unwatched"]  # watching changes nothing
    for name in ("unwatched", "bone"):
        assert not any("rotation" in key for row in rows[name] for key in row)
        assert plot_rotations(runs[name] / "metrics.jsonl", tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
