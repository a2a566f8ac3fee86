"""A tiny model and two adapters that answer otherwise than it does."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from helpers.fixtures import _own_cache, jsonl, llama

__all__ = ["_own_cache", "jsonl", "llama"]


@pytest.fixture(scope="session")
def adapters(llama, tmp_path_factory) -> dict[str, Path]:
    """Folders of a bone and a bat-row adapter, which name their base."""
    from transformers import AutoModelForCausalLM

    from flashbone import BoneConfig

    folders = {}
    for seed, (name, variant) in enumerate((("first", "bone"), ("second", "bat-row"))):
        config = BoneConfig(r=8, variant=variant, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "bone_" in parameter_name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return folders
