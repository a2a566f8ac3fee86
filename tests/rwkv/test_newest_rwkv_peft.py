"""What RWKV-PEFT writes since it trains with PEFT's MISS: folders with RWKV's names, and merged models."""

import pytest
import torch
from peft import MissConfig, get_peft_model

from flashbone.conversion import convert
from flashbone.files import reading
from flashbone.merge import merge_checkpoint
from flashbone.rwkv import from_pth
from helpers.comparison import close
from helpers.rwkv import write_rwkv


@pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning")
@pytest.mark.parametrize("version", [7, 6])
def test_its_miss_folders_are_merged_and_converted(version, tmp_path):
    base = write_rwkv(tmp_path / "base.pth", version)
    names = ["receptance", "key", "value", "output"]
    model = get_peft_model(from_pth(base), MissConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "miss_block" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(tmp_path / "proj-adapter")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        want = model.eval()(tokens).logits
        merge_checkpoint(base, tmp_path / "proj-adapter", tmp_path / "rwkv-0.pth")
        close(from_pth(tmp_path / "rwkv-0.pth")(tokens).logits, want, torch.float32)
    report = convert(tmp_path / "proj-adapter", tmp_path / "old.pth", "rwkv-peft")
    assert (report.source, report.variant) == ("miss", "bone")
    blocks = reading.read_adapter(tmp_path / "old.pth").blocks
    assert blocks.keys() == reading.read_adapter(tmp_path / "proj-adapter").blocks.keys()
