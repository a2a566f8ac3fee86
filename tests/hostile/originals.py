"""Whole files of every kind that the commands read, small, to be damaged; and the commands that read each."""

import json
import shutil
from pathlib import Path

import torch

from flashbone.conversion import convert
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import blocks_for, write_adapter
from helpers.rwkv import write_rwkv
from helpers.tiny_llama import questions, write_tiny_llama

RECIPE = """\
model: model
data: {path: rows.jsonl, eval: 4}
adapter: {variant: bone, r: 4, target_modules: [q_proj, v_proj]}
training: {max_steps: 1, per_device_train_batch_size: 1, max_length: 32, report_to: none}
output: OUT/run
"""
COMPARISON = """\
model: model
data: {path: rows.jsonl, eval: 2, test: 2}
methods: [bone, lora]
budget: {method: bone, r: 4}
learning_rates: [1.0e-3]
seeds: [0]
training: {max_steps: 1}
output: results
"""

_INSPECT, _CONVERT = ["inspect", "adapter"], ["convert", "adapter", "OUT/a", "--to"]
_MERGE = ["merge", "model", "adapter", "OUT/m"]
_EVAL = ["eval", "model", "--perplexity", "rows.jsonl", "--limit", "1", "--max-length", "16"]
_PICKLED = [["pickled" if word == "adapter" else word for word in c] for c in (_INSPECT, _MERGE, [*_CONVERT, "miss"])]
_CLASSES = ["eval", "model", "--adapter", "run/adapter", "--classification", "labelled.csv", "--limit", "1"]

# File -> how many damaged copies of it are tried, and the commands that read it, in turns.
COMMANDS: dict[str, tuple[int, list[list[str]]]] = {
    "adapter/adapter_model.safetensors": (400, [_INSPECT, _MERGE, [*_CONVERT, "peft"], [*_CONVERT, "miss"]]),
    "adapter/adapter_config.json": (600, [_INSPECT, _MERGE, [*_CONVERT, "lora", "--base", "model"]]),
    "pickled/adapter_model.bin": (400, _PICKLED),
    "model/model.safetensors": (300, [_MERGE, [*_CONVERT, "lora", "--base", "model"], [*_CONVERT, "gguf"]]),
    "model/config.json": (300, [_MERGE, ["inspect", "model"], ["inspect", "model", "--json"]]),
    "rwkv.pth": (300, [["inspect", "rwkv.pth"], ["merge", "rwkv.pth", "rwkv-adapter.pth", "OUT/r.pth"]]),
    "rwkv-adapter.pth": (
        250,
        [["inspect", "rwkv-adapter.pth"], ["convert", "rwkv-adapter.pth", "OUT/a", "--to", "peft"]],
    ),
    "model/tokenizer.json": (60, [_EVAL]),
    "model/tokenizer_config.json": (60, [_EVAL]),
    "model/chat_template.jinja": (40, [["eval", "model", "--exact-match", "answers.jsonl", "--max-new-tokens", "8"]]),
    "model/generation_config.json": (40, [_EVAL]),
    "model.gguf": (40, [["eval", "model.gguf", "--perplexity", "rows.jsonl", "--limit", "1"]]),
    "rows.jsonl": (60, [_EVAL]),
    "labelled.csv": (60, [_CLASSES]),
    "rows.parquet": (60, [["eval", "model", "--perplexity", "rows.parquet", "--limit", "1"]]),
    "run/summary.json": (60, [_CLASSES]),
    "run/recipe.json": (
        40,
        [["eval", "model", "--adapter", "run/adapter", "--perplexity", "rows.jsonl", "--limit", "1"]],
    ),
    "model/merge.json": (60, [_MERGE]),
    "recipe.yaml": (
        150,
        [["inspect", "model", "--config", "recipe.yaml"], ["train", "recipe.yaml", "--model", "absent"]],
    ),
    "comparison.yaml": (80, [["compare", "comparison.yaml", "--report"]]),
    "results/results.jsonl": (80, [["compare", "comparison.yaml", "--report", "--json"]]),
}


def write(folder: Path) -> None:
    """All of them, in one folder."""
    torch.manual_seed(0)
    model = write_tiny_llama(folder / "model")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    blocks = blocks_for(loaded, "bone", ("q_proj", "v_proj"), 4)
    fields = {
        "base_model_name_or_path": "model",
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"0.q_proj": 4},
    }
    write_adapter(folder / "adapter", "bone", blocks, **fields)
    write_adapter(folder / "run/adapter", "bone", blocks, target_modules=["q_proj", "v_proj"])
    write_adapter(folder / "pickled", "bone", blocks, target_modules=["q_proj", "v_proj"])
    (folder / "pickled/adapter_model.safetensors").unlink()
    state = {f"base_model.model.{name}.bone_block": block for name, block in blocks.items()}
    torch.save(state, folder / "pickled/adapter_model.bin")
    write_rwkv(folder / "rwkv.pth", 7)
    torch.save({"blocks.0.att.key.disha": torch.randn(4, 32)}, folder / "rwkv-adapter.pth")
    _write_rows(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "comparison.yaml").write_text(COMPARISON)
    merge_checkpoint(model, folder / "adapter", folder / "merged")
    (folder / "merged/merge.json").rename(model / "merge.json")
    shutil.rmtree(folder / "merged")
    convert(folder / "adapter", folder / "model.gguf", "gguf", base=model)
    (folder / "results").mkdir()
    (folder / "results/results.jsonl").write_text('{"kind": "comparison"}\n{"kind": "method", "method": "bone"}\n')


def _write_rows(folder: Path) -> None:
    import pandas as pd

    rows = questions(8)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame([{"text": row["prompt"] + row["completion"]} for row in rows]).to_parquet(folder / "rows.parquet")
    (folder / "answers.jsonl").write_text('{"question": "where is the cat ?", "answer": "on a mat #### 3"}\n')
    (folder / "labelled.csv").write_text("text,label\nthe cat sat,red\nthe dog ran,blue\n")
    (folder / "run/summary.json").write_text(json.dumps({"labels": ["red", "blue"], "model": "model"}))
    (folder / "run/recipe.json").write_text(json.dumps({"model": "m", "data": {"path": "d"}, "output": "o"}))
