"""TRL's trainers with `peft_config=BoneConfig(...)`: what is trained, what the reference is, what is saved."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import BoneConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from flashbone.files import cards
from helpers.comparison import Promise, close, same_bits
from helpers.tiny_llama import questions

# transformers 5.23 about what trl 1.16 and peft 0.21 call
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

TOKENS = torch.arange(9)[None]
ROWS = questions(8)
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in ROWS]
STEPS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def different_tokens(completions, **_) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def config(variant: str, **fields) -> BoneConfig:
    return BoneConfig(r=8, variant=variant, mini_r=4, target_modules=["q_proj", "down_proj"], **fields)


def trainer_of(kind, llama, folder, variant):
    """The trainer, and the model that it got, before."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    if kind is RewardTrainer:
        torch.manual_seed(1)  # of the head
        base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
        settings = config(variant, task_type="SEQ_CLS")
    else:
        base, settings = AutoModelForCausalLM.from_pretrained(llama), config(variant)
    before = copy.deepcopy(base)
    shared = {"model": base, "processing_class": tokenizer, "peft_config": settings}
    if kind is GRPOTrainer:
        arguments = GRPOConfig(str(folder), max_completion_length=6, num_generations=2, **STEPS)
        prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
        return kind(reward_funcs=different_tokens, args=arguments, train_dataset=prompts, **shared), before
    arguments = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, RewardTrainer: RewardConfig}[kind](str(folder), **STEPS)
    rows = Dataset.from_list(ROWS if kind is SFTTrainer else PAIRS)
    return kind(args=arguments, train_dataset=rows, **shared), before


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        (SFTTrainer, "bone"),
        (SFTTrainer, "mini"),
        (DPOTrainer, "bat-row"),
        (DPOTrainer, "orthogonal"),
        (GRPOTrainer, "bat-col"),
        (GRPOTrainer, "bone"),
        (RewardTrainer, "orthogonal"),
        (RewardTrainer, "bat-col"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_trainer_changes_the_blocks_alone_and_saves_what_loads_again(kind, variant, llama, tmp_path):
    trainer, base = trainer_of(kind, llama, tmp_path, variant)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {n for n in before if "bone_block" in n or "modules_to_save" in n}
    assert len([name for name in changed if "bone_block" in name]) == 4

    trainer.save_model(tmp_path / "adapter")
    model = trainer.model.eval()
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert close(again(TOKENS).logits, model(TOKENS).logits)  # the copied base lies otherwise in memory
        with again.disable_adapter():
            plain = again(TOKENS).logits
        assert not torch.equal(plain, model(TOKENS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bone", "bat-col", "bat-row"])
def test_the_reference_of_dpo_is_the_model_without_its_adapter(variant, llama, tmp_path):
    trainer, base = trainer_of(DPOTrainer, llama, tmp_path, variant)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    first, *_ = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are equal at the start
    assert [first["rewards/chosen"], first["rewards/rejected"]] == pytest.approx([0, 0], abs=1e-5)
    assert trainer.ref_model is None
    tokens = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = trainer.model.eval()(**tokens).logits
        assert close(reference, base.eval()(**tokens).logits)
    with torch.no_grad():
        assert not torch.equal(trainer.model(**tokens).logits, reference)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DPOTrainer, GRPOTrainer])
@pytest.mark.parametrize("variant", ["bone", "orthogonal"])
def test_the_reference_of_a_trained_adapter_is_that_adapter(kind, variant, llama, tmp_path):
    torch.manual_seed(2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config(variant, init_weights=False))
    shared = {"model": model, "processing_class": AutoTokenizer.from_pretrained(llama)}
    if kind is DPOTrainer:
        trainer = kind(args=DPOConfig(str(tmp_path), **STEPS), train_dataset=Dataset.from_list(PAIRS), **shared)
    else:
        arguments = GRPOConfig(str(tmp_path), max_completion_length=6, num_generations=2, beta=0.1, **STEPS)
        rows = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
        trainer = kind(args=arguments, reward_funcs=different_tokens, train_dataset=rows, **shared)
    started = {n: p.detach().clone() for n, p in model.named_parameters() if "bone_block.ref" in n}
    trainer.train()
    first, *_ = (entry for entry in trainer.state.log_history if "loss" in entry)
    if kind is DPOTrainer:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert len(started) == 4
    for name, block in started.items():
        assert same_bits(model.get_parameter(name), block, Promise.UNTOUCHED)  # the reference stays
        assert not torch.equal(model.get_parameter(name.replace(".ref", ".default")), block)


def test_only_an_adapter_called_ref_with_the_config_of_another_starts_as_its_copy(llama):
    settings = config("bone", init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), settings)
    model.add_adapter("same config", settings)
    model.add_adapter("ref", copy.deepcopy(settings))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.bone_block["same config"], layer.bone_block["default"])
    assert not torch.equal(layer.bone_block["ref"], layer.bone_block["default"])


@pytest.mark.slow
def test_an_interrupted_sft_run_resumes_to_the_losses_of_one_never_stopped(llama, tmp_path):
    def run(folder, stop: int, resume: bool) -> list[float]:
        torch.manual_seed(0)
        arguments = STEPS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(llama),
            args=SFTConfig(str(folder), **arguments),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(llama),
            peft_config=config("bat-col", dropout=0.2),
        )
        trainer.add_callback(stop_after(stop))
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run(tmp_path / "whole", 4, resume=False)
    card = (tmp_path / "whole/README.md").read_text()  # TRL wrote it at a checkpoint
    assert "generated_from_trainer" in card
    assert (card.count(cards.BEGIN), "[None]" in card) == (1, False)
    assert run(tmp_path / "parts", 2, resume=False) == whole[:2]
    assert run(tmp_path / "parts", 4, resume=True) == whole


def stop_after(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == step

    return Stop()
