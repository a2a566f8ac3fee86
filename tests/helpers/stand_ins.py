"""Small things under the names that pages use: models, adapters, rows, the examples of the repository."""

import json
from collections.abc import Iterable
from pathlib import Path

from helpers.pages import ROOT
from helpers.tiny_llama import WORDS, word_tokenizer, write_tiny_llama

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write_rows(file: str | Path, rows: Iterable[dict]) -> None:
    """A file of one JSON object a line."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def link_examples(folder: Path) -> None:
    """The repository's examples in this folder, as at its root."""
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)


def write_adapter_of(base: str | Path, folder: str | Path, **fields) -> None:
    """A Bone adapter with random blocks, on every linear layer of the model unless the fields say otherwise."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from flashbone import BoneConfig

    fields = {"r": 8, "target_modules": "all-linear", "init_weights": False, "task_type": "CAUSAL_LM"} | fields
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), BoneConfig(**fields)).save_pretrained(folder)


def write_llama_and_adapters(base: str = "base", **adapters: dict) -> None:
    """A tiny Llama, and adapters of it by their folders' names (`_` for `-`) with their fields."""
    write_tiny_llama(Path(base))
    for name, fields in adapters.items():
        write_adapter_of(base, name.replace("_", "-"), **fields)


def write_tiny_bert(folder: str | Path, words: Iterable[str] = WORDS.split(), **sizes: float) -> None:
    """An encoder without a head, and its tokenizer of these whole words."""
    import torch
    from transformers import BertConfig, BertModel

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer = word_tokenizer([*special, *words], *special)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
