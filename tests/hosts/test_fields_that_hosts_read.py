"""Fields that hosts read off a PEFT config: BoneConfig has them, or what reads them is for LoRA alone."""

import importlib.util
import re
from pathlib import Path

import pytest
from peft import BoneConfig

CONFIGS = r"\w*peft_config|\w*lora_config|adapter_config|default_config"
READ = re.compile(rf"\b(?:{CONFIGS})(?:\[[^]\n]*\])?\.([a-z_]+)\b")
# Of a dict of configs, a list of names, a path; of a property, and of a model's own `adapter_config`.
NOT_FIELDS = {"keys", "items", "values", "get", "pop", "append", "json", "yaml", "setter"}
NOT_FIELDS |= {"update", "vision_feature_layer"}
# Fields that BoneConfig lacks -> the condition under which hosts read them, which a BoneConfig never meets.
BEHIND_A_CHECK = {
    "prompt learning": {
        "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
        "encoder_hidden_size", "cpt_tokens_type_mask", "cpt_token_ids",
    },
    "isinstance(peft_config, LoraConfig)": {"use_dora"},
    "peft_type == LORA": {"alpha_pattern", "lora_alpha", "use_rslora", "init_lora_weights"},
}  # fmt: skip


def fields_read(package: str) -> dict[str, str]:
    """Field -> file and line of each that a package reads."""
    root = Path(importlib.util.find_spec(package).origin).parent
    reads = {}
    for path in root.rglob("*.py"):
        if package == "peft" and "tuners" in path.parts and path.name != "tuners_utils.py":  # of other methods
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for field in READ.findall(line):
                reads.setdefault(field, f"{path.relative_to(root)}:{number}: {line.strip()}")
    return reads


@pytest.mark.parametrize("package", ["peft", "transformers", "trl", "accelerate"])
def test_every_field_that_a_host_reads_exists_or_is_behind_a_check(package):
    config, known = BoneConfig(), NOT_FIELDS.union(*BEHIND_A_CHECK.values())
    reads = fields_read(package)
    assert reads or package == "accelerate"
    assert {field: where for field, where in reads.items() if field not in known and not hasattr(config, field)} == {}


def test_what_is_behind_a_check_is_really_missing():
    assert not any(hasattr(BoneConfig(), field) for fields in BEHIND_A_CHECK.values() for field in fields)
