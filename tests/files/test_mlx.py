"""LoRAs for mlx-lm; tests/engines runs them there."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from flashbone.conversion import convert
from flashbone.errors import FormatError
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import blocks_for, tiny_gpt2, tiny_llama, write_adapter
from helpers.comparison import Promise, close, same_bits

ROLES = ("q_proj", "down_proj", "lm_head")


def test_the_folder_is_what_mlx_lm_reads(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    blocks = blocks_for(model, "bone", ROLES, 6)
    write_adapter(tmp_path / "adapter", "bone", blocks, r=6)
    report = convert(tmp_path / "adapter", tmp_path / "out", engine="mlx", base=tmp_path / "base")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 6,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": ["lm_head", "mlp.down_proj", "self_attn.q_proj"],
        },
        "model": str(tmp_path / "base"),
    }
    state = load_file(tmp_path / "out/adapters.safetensors")
    assert set(state) == {f"{name}.lora_{which}" for name in blocks for which in "ab"}
    x = torch.randn(3, 20)
    for name in blocks:
        if not name.endswith("down_proj"):
            padded = torch.nn.functional.pad(x, (0, 4)).view(3, 4, 6).sum(1)
            got = x @ state[f"{name}.lora_a"] @ state[f"{name}.lora_b"]
            close(got, padded @ blocks[name], torch.float32)
    assert "rope_theta" in report.beside  # which transformers 5 does not write where mlx-lm looks
    with pytest.raises(FormatError, match="mlx-lm are only written"):
        convert(tmp_path / "out", tmp_path / "again", "peft")


@pytest.mark.parametrize("way", [{"to": "mlx"}, {"engine": "mlx"}])
def test_layers_that_mlx_lm_has_no_place_for_are_refused(way, tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", blocks_for(model, "bone", ("c_attn",), 6), r=6)
    with pytest.raises(FormatError, match=r"keep their weight as \(in, out\): transformer\.h\.0\.attn\.c_attn"):
        convert(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", **way)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 123456.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
    ],
)
def test_a_merged_model_has_its_rope_where_mlx_lm_and_where_transformers_read_it(rope, tmp_path):
    model = tiny_llama(rope_parameters=rope)
    model.save_pretrained(tmp_path / "base")
    blocks = {name: block * 0 for name, block in blocks_for(model, "bone", ("q_proj",), 6).items()}
    write_adapter(tmp_path / "adapter", "bone", blocks, r=6)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"]
    assert written.get("rope_scaling") == (rope if "factor" in rope else None)
    loaded, base = (AutoConfig.from_pretrained(tmp_path / name) for name in ("out", "base"))
    assert loaded.rope_parameters == base.rope_parameters == rope
    same_bits(type(model)(loaded).eval().model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, Promise.STORED)
