"""Twenty steps on a tiny Llama, in one process or in several: what the tests compare."""

import os
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from flashbone import BoneConfig
from helpers.tiny_llama import questions, tiny_config, tiny_tokenizer

BATCH, STEPS = 8, 20


def rows() -> list[dict[str, list[int]]]:
    """All of one length: a mean over processes is then the mean over the batch."""
    tokens = tiny_tokenizer()
    ids = [tokens(row["prompt"] + row["completion"]).input_ids for row in questions(64)]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]


def tiny_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(len(tiny_tokenizer()))).to(dtype)


def adapted(variant: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return get_peft_model(tiny_model(dtype), BoneConfig(r=16, variant=variant, mini_r=8, target_modules="all-linear"))


def trainer(model: nn.Module, output: Path, steps: int = STEPS, **fields) -> Trainer:
    """Of the same global batches, in the same order, for any number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        dataloader_pin_memory=False,
        use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,  # accelerate would leave DeepSpeed out
        ddp_backend="gloo" if processes > 1 else None,
        **fields,
    )
    made = Trainer(model, args, train_dataset=rows())
    made.remove_callback(PrinterCallback)
    return made


def losses(trained: Trainer) -> list[float]:
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"] for row in rows()[:4]])).logits
