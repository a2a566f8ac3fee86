"""Whole training runs: what `flashbone train` and TRL's SFTTrainer do with the same rows."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Setting
from benchmarks.commands.train import DEMO
from benchmarks.memory import peak_mib, reset_peak
from benchmarks.methods import METHODS
from benchmarks.models import LINEARS, load_model

EXCHANGES = 4
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PACKED = {"plain": {}, "packing": {"packing": True}, "padding-free": {"padding_free": True, "max_length": None}}


class TrainSubject:
    """One pass over the rows of a case, from the model's files to the adapter's."""

    def __init__(self, case: Case) -> None:
        # Importing is no part of it.
        import trl  # noqa: F401

        import flashbone.train.run  # noqa: F401

        self.case = case
        self.model = DEMO / "smollm2"
        chats = _small_talk() if case.shape["model"] == "tiny" else _read(DEMO / "chat" / "train.jsonl")
        if case.shape["model"] == "tiny":
            self.model = Path(case.scratch, "model")
            _write_tiny(self.model)
        self.exchanges = [chat["messages"] for chat in chats[: case.shape["rows"]]]

    def prepare(self, setting: Setting) -> Callable[[], dict[str, float]]:
        """Its time and its peak of memory; of the frozen model the peak of loading it."""
        runs = {"frozen": self._load, "bone": self._flashbone}

        def repetition() -> dict[str, float]:
            reset_peak(self.case.device)
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=self.case.scratch) as out:
                steps_s = runs.get(setting.method, self._trl)(setting, Path(out))
            whole_s = time.perf_counter() - start
            times = {} if steps_s is None else {"whole_ms": whole_s * 1e3, "steps_ms": steps_s * 1e3}
            return {**times, "peak_mib": peak_mib(self.case.device)}

        return repetition

    @property
    def arguments(self) -> dict[str, Any]:
        """What both trainers are told; a layout of answers is a matter of the rows."""
        return {
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.case.shape["batch"],
            "max_length": 512,
            "learning_rate": 1e-4,
            "bf16": self.case.is_autocast,
            "use_cpu": self.case.device == "cpu",
            "save_strategy": "no",
            "report_to": "none",
            **PACKED.get(self.case.shape["how"], {}),
        }

    def _load(self, setting: Setting, out: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.case.base_dtype))
        for parameter in model.parameters():
            parameter.sum()  # read, so that it is in memory and not in the file alone

    def _flashbone(self, setting: Setting, out: Path) -> float:
        from flashbone.train.recipe import load_recipe
        from flashbone.train.run import train

        rows = [{"messages": messages} for messages in self._conversations()]
        data = {"path": str(_write(out / "rows.jsonl", rows)), "eval": None}
        if self.case.shape["how"] == "answers":
            data["turns"] = "last"
        adapter = {"variant": setting.method, "r": setting.r, "target_modules": LINEARS}
        recipe = {"model": str(self.model), "data": data, "adapter": adapter, "training": self.arguments}
        file = out / "recipe.yaml"
        file.write_text(json.dumps({**recipe, "output": str(out / "run")}), encoding="utf-8")
        return train(load_recipe(file)).summary["train_s"]

    def _conversations(self) -> Iterator[list[dict[str, str]]]:
        """The rows of this layout."""
        if self.case.shape["how"] in PACKED:
            yield from self.exchanges
            return
        for start in range(0, len(self.exchanges), EXCHANGES):
            whole = [message for messages in self.exchanges[start : start + EXCHANGES] for message in messages]
            ends = [len(whole)] if self.case.shape["how"] == "conversations" else range(2, len(whole) + 1, 2)
            yield from (whole[:end] for end in ends)

    def _trl(self, setting: Setting, out: Path) -> float:
        import peft
        from datasets import Dataset
        from transformers import AutoModelForCausalLM
        from trl import SFTConfig, SFTTrainer

        method = METHODS[setting.method]
        config = getattr(peft, method.config)(target_modules=LINEARS, **method.fields(setting.r))
        # A prompt and its completion: the answer alone is learned, as flashbone does.
        rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in self._conversations()]
        arguments = SFTConfig(str(out / "run"), **self.arguments, gradient_checkpointing=False, logging_steps=5)
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.case.base_dtype))
        trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), peft_config=config)
        steps_s = trainer.train().metrics["train_runtime"]
        trainer.save_model(str(out / "run"))
        return steps_s


def _small_talk() -> list[dict[str, Any]]:
    ask = [{"role": "user", "content": "who is there ?"}, {"role": "assistant", "content": "nobody"}]
    return [{"messages": ask}] * 8


def _write_tiny(folder: Path) -> None:
    """A Llama of no knowledge, and a tokenizer with a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:120]
    raw = Tokenizer(models.BPE({word: number for number, word in enumerate([*special, *letters])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    load_model("tiny", "float32", "cpu").save_pretrained(folder)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
