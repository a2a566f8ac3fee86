"""transformers' Trainer, gradient checkpointing and torch.compile on a whole model, with adapters of every variant."""

import pytest
import torch
from peft import BoneConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from helpers.adapter_folders import tiny_llama
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import close
from helpers.processes import run_apart
from helpers.transformers_peft import needs_transformers_own_adapters

# transformers 5.23 about what peft 0.21 and its own Trainer call
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

TOKENS = torch.arange(24).view(2, 12)
TARGETS = ["q_proj", "o_proj", "down_proj"]


def config(variant: str, **fields) -> BoneConfig:
    return BoneConfig(**{"r": 6, "variant": variant, "mini_r": 4, "target_modules": TARGETS} | fields)


def adapted(variant: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), config(variant, init_weights=False)).train()


def adapted_in_every_way() -> torch.nn.Module:
    """One adapter of each variant, on a layer of its own, all active."""
    torch.manual_seed(0)
    places = dict(zip(VARIANT_NAMES, ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], strict=True))
    configs = {variant: config(variant, init_weights=False, target_modules=[name]) for variant, name in places.items()}
    base = tiny_llama()
    base.model.layers = base.model.layers[:1]
    model = get_peft_model(base, configs["bone"], "bone")
    for variant in VARIANT_NAMES[1:]:
        model.add_adapter(variant, configs[variant])
    model.base_model.set_adapter(list(VARIANT_NAMES))
    return model.train()


def train(model, run=None, steps: int = 3) -> list[float]:
    """The losses of a few steps; `run` is the model as it is called."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    losses = []
    for _ in range(steps):
        loss = (model if run is None else run)(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_gradient_checkpointing_of_a_whole_model_changes_no_loss(variant, reentrant):
    want = train(adapted(variant))
    model = adapted(variant)
    model.enable_input_require_grads()  # which reentrant checkpointing needs
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    layer = model.base_model.model.model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert train(model) == pytest.approx(want, rel=1e-6)
    assert len(calls) == 6  # once more in each backward pass
    assert want[2] < want[0] - 2e-4


COMPILED = """
import sys, torch, flashbone
sys.path += sys.argv[1:]
from test_trainer import adapted_in_every_way, train
eager, model = adapted_in_every_way(), adapted_in_every_way()
start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
want, got = train(eager), train(model, torch.compile(model, backend="aot_eager", fullgraph=True))
assert all(abs(a - b) < 1e-5 * b for a, b in zip(got, want, strict=True)), (got, want)
assert len(start) == 5
for name, block in eager.named_parameters():
    if name in start:  # each step is the same, variant by variant
        change, other = block - start[name], model.get_parameter(name) - start[name]
        assert change.norm() > 1e-5 and (change - other).norm() < 1e-3 * change.norm(), name
print("trained")
"""


@pytest.mark.slow
def test_a_compiled_model_with_every_variant_trains_as_in_eager_mode(tmp_path):
    done = run_apart(COMPILED, tmp_path)
    assert done.stdout == "trained\n", done.stderr


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def run_trainer(model, folder, stop: int = 4, resume: bool = False) -> list[float]:
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(8, 12) % 29]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Stop(stop)])
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_an_interrupted_trainer_resumes_to_the_losses_of_one_never_stopped(variant, llama, tmp_path):
    def run(folder, **options) -> list[float]:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(llama)
        return run_trainer(get_peft_model(base, config(variant, dropout=0.2)), tmp_path / folder, **options)

    whole = run("whole")
    assert run("parts", stop=2) == whole[:2]
    assert run("parts", resume=True) == whole


@needs_transformers_own_adapters
def test_the_trainer_takes_adapters_that_the_model_got_by_add_adapter(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.add_adapter(config("bat-row"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run_trainer(model, tmp_path)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "bone_block" in name}
    again = AutoModelForCausalLM.from_pretrained(llama)
    again.load_adapter(str(tmp_path / "checkpoint-4"))
    assert close(again(TOKENS).logits, model.eval()(TOKENS).logits)  # loaded blocks lie in memory as in the file


@needs_transformers_own_adapters
@pytest.mark.parametrize("method", [config("bone"), LoraConfig(target_modules=TARGETS)], ids=["bone", "lora"])
def test_the_trainer_resumes_no_method_that_came_by_add_adapter(method, llama, tmp_path):
    for resume in (False, True):
        model = AutoModelForCausalLM.from_pretrained(llama)
        model.add_adapter(method)
        if not resume:
            run_trainer(model, tmp_path, stop=2)
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):  # it looks for a whole model
        run_trainer(model, tmp_path, resume=True)
