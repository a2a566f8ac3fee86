"""Whole files of every kind that the commands read, small, to be damaged; and the commands that read each."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from compare.report import comparison_rows
from flashbone.cli import main
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import blocks_for, write_adapter
from helpers.rwkv import write_rwkv
from helpers.tiny_llama import questions, write_tiny_llama

RECIPE = """\
model: model
data: {path: rows.jsonl, eval: 4}
adapter: {variant: bone, r: 4, target_modules: [q_proj, v_proj]}
training: {max_steps: 1, per_device_train_batch_size: 1, max_length: 32, report_to: none}
samples: 0
output: OUT/run
"""
CLASSES = """\
model: model
task: classification
data: {path: labelled.csv, eval: null}
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
output: OUT/r
"""

_INSPECT, _CONVERT = ["inspect", "adapter"], ["convert", "adapter", "OUT/a", "--to"]
_MERGE = ["merge", "model", "adapter", "OUT/m"]
_EVAL = ["eval", "model", "--perplexity", "rows.jsonl", "--limit", "1", "--max-length", "16"]
_PICKLED = [["pickled" if word == "adapter" else word for word in c] for c in (_INSPECT, _MERGE, [*_CONVERT, "miss"])]
_CLASSES = ["eval", "model", "--adapter", "run/adapter", "--classification", "labelled.csv", "--limit", "1"]

_RECIPE = ["recipe.yaml", "--output", "OUT/run"]
_TRAIN, _DRY = ["train", *_RECIPE], ["train", *_RECIPE, "--dry-run"]
_CLASSIFY = ["train", "classes.yaml", "--output", "OUT/run"]
# Commands that need more of the processor than the two seconds of the others, since they train or draw.
SLOWER = {"train": 6.0, "compare": 4.0}

# File -> how many damaged copies of it are tried, and the commands that read it, in turns.
COMMANDS: dict[str, tuple[int, list[list[str]]]] = {
    "adapter/adapter_model.safetensors": (320, [_INSPECT, _MERGE, [*_CONVERT, "peft"], [*_CONVERT, "miss"]]),
    "adapter/adapter_config.json": (
        480,
        [_INSPECT, _MERGE, [*_CONVERT, "lora", "--base", "model"], [*_EVAL, "--adapter", "adapter"]],
    ),
    "pickled/adapter_model.bin": (320, _PICKLED),
    "model/model.safetensors": (300, [_MERGE, [*_CONVERT, "lora", "--base", "model"], [*_CONVERT, "gguf"]]),
    "model/config.json": (300, [_MERGE, ["inspect", "model"], ["inspect", "model", "--json"]]),
    "rwkv.pth": (300, [["inspect", "rwkv.pth"], ["merge", "rwkv.pth", "rwkv-adapter.pth", "OUT/r.pth"]]),
    "rwkv-adapter.pth": (
        250,
        [["inspect", "rwkv-adapter.pth"], ["convert", "rwkv-adapter.pth", "OUT/a", "--to", "peft"]],
    ),
    "model/tokenizer.json": (80, [_EVAL, _EVAL, _DRY, _TRAIN]),
    "model/tokenizer_config.json": (80, [_EVAL, _EVAL, _DRY, _TRAIN]),
    "model/chat_template.jinja": (40, [["eval", "model", "--exact-match", "answers.jsonl", "--max-new-tokens", "8"]]),
    "model/generation_config.json": (40, [_EVAL]),
    "base/model.gguf": (60, [["eval", "base/model.gguf", "--perplexity", "rows.jsonl", "--limit", "1"]]),
    "rows.jsonl": (90, [_EVAL, _DRY, _TRAIN]),
    "chats.jsonl": (60, [[*_DRY, "--data.path", "chats.jsonl"], [*_TRAIN, "--data.path", "chats.jsonl"]]),
    "labelled.csv": (60, [_CLASSES, _CLASSIFY]),
    "rows.parquet": (60, [["eval", "model", "--perplexity", "rows.parquet", "--limit", "1"]]),
    "run/summary.json": (60, [_CLASSES]),
    "lm/recipe.json": (
        40,
        [["eval", "model", "--adapter", "lm/adapter", "--perplexity", "rows.jsonl", "--limit", "1"]],
    ),
    "model/merge.json": (60, [_MERGE]),
    "recipe.yaml": (
        160,
        [["inspect", "model", "--config", "recipe.yaml"], ["train", "recipe.yaml", "--model", "absent"], _DRY, _TRAIN],
    ),
    "comparison.yaml": (40, [["compare", "comparison.yaml", "--report"], ["compare", "comparison.yaml", "--plan"]]),
    "OUT/r/results.jsonl": (40, [["compare", "comparison.yaml", "--report", "--json"]]),
}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    home = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(home)


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
        "rank_pattern": {"0.self_attn.q_proj": 4},
    }
    write_adapter(folder / "adapter", "bone", blocks, **fields)
    write_adapter(folder / "pickled", "bone", blocks, target_modules=["q_proj", "v_proj"])
    (folder / "pickled/adapter_model.safetensors").unlink()
    state = {f"base_model.model.{name}.bone_block": block for name, block in blocks.items()}
    torch.save(state, folder / "pickled/adapter_model.bin")
    write_rwkv(folder / "rwkv.pth", 7)
    torch.save({"blocks.0.att.key.disha": torch.randn(4, 32)}, folder / "rwkv-adapter.pth")
    _write_rows(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "comparison.yaml").write_text(COMPARISON)
    (folder / "classes.yaml").write_text(CLASSES)
    merge_checkpoint(model, folder / "adapter", folder / "merged")
    (folder / "merged/merge.json").rename(model / "merge.json")
    shutil.rmtree(folder / "merged")
    (folder / "OUT/r").mkdir(parents=True)
    comparison_rows.write(folder / "OUT/r", comparison_rows.comparison({"bone": 0.0, "lora": -0.1}, (0, 1), rows=8))
    write_gguf(folder / "base/model.gguf")
    for recipe, out in (("classes.yaml", "run"), ("recipe.yaml", "lm")):
        with inside(folder):
            assert main(["train", recipe, "--output", out]) == 0
        shutil.rmtree(folder / out / "merged", ignore_errors=True)


def _write_rows(folder: Path) -> None:
    import pandas as pd

    rows = questions(8)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame([{"text": row["prompt"] + row["completion"]} for row in rows]).to_parquet(folder / "rows.parquet")
    (folder / "answers.jsonl").write_text('{"question": "where is the cat ?", "answer": "on a mat #### 3"}\n')
    (folder / "labelled.csv").write_text("text,label\nthe cat sat,red\nthe dog ran,blue\n")
    roles = ("user", "assistant")
    talks = [[{"role": role, "content": text} for role, text in zip(roles, row.values(), strict=True)] for row in rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def write_gguf(file: Path) -> None:
    """A Llama of one layer with a tokenizer of letters."""
    import gguf
    import numpy as np

    file.parent.mkdir()
    writer, hidden, inner = gguf.GGUFWriter(file, "llama"), 32, 64
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = ["<unk>", "<s>", "</s>", "ab", *map(chr, range(33, 123))]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden), "output_norm": (hidden,)}
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (inner, hidden) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (hidden, inner), "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.01, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
