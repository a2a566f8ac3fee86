"""Adapter folders written by hand, as PEFT and flashbone write them, and the tiny models that they fit."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashbone import variants
from helpers.blocks import VARIANT_NAMES

ROOT = "base_model.model."


def write_adapter(
    folder: Path,
    variant: str,
    blocks: dict[str, Tensor],
    *,
    r: int = 4,
    others: dict[str, Tensor] | None = None,
    **fields,
) -> Path:
    """An adapter folder: blocks by module name, other tensors by the key that follows `base_model.model.`."""
    assert variant in VARIANT_NAMES
    state = {f"{ROOT}{module}.bone_block": block for module, block in blocks.items()}
    state |= {f"{ROOT}{key}": tensor for key, tensor in (others or {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "adapter_model.safetensors")
    write_config(folder, variant=variant, r=r, **fields)
    return folder


def write_config(folder: Path, **fields) -> None:
    """adapter_config.json; a field given as None is left out."""
    config = {"peft_type": "BONE", "init_weights": True, "base_model_name_or_path": None, "mini_r": 3} | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))


def blocks_for(
    model: torch.nn.Module, variant: str, targets: tuple[str, ...], r: int, std: float = 0.3
) -> dict[str, Tensor]:
    """Random fp32 blocks for the modules whose last name is one of the targets; Conv1D's weight is (in, out)."""
    blocks = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            out, in_ = module.weight.shape[::-1] if type(module).__name__ == "Conv1D" else module.weight.shape
            blocks[name] = torch.randn(variants.get(variant).block_shape(out, in_, r, 3)) * std
    assert blocks
    return blocks


def tiny_llama(**fields) -> torch.nn.Module:
    """Two layers; sizes that r = 6 does not divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        vocab_size=50,
        **fields,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> torch.nn.Module:
    """Conv1D layers, of which attn.c_proj is square; tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def tiny_bert(classifier: bool = True) -> torch.nn.Module:
    """A classifier on two layers, or the bare encoder."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=16,
    )
    return (BertForSequenceClassification(config) if classifier else BertModel(config)).eval()


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
