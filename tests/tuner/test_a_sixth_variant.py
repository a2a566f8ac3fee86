"""A new variant is one file: this one is registered here, and everything else takes it as it takes the other five."""

import json

import pytest
import torch
from jaxtyping import Float
from peft import PeftModel, get_peft_model
from torch import Tensor

from flashbone import BoneConfig, cli, merge_checkpoint, shards, variants
from flashbone.files import reading
from flashbone.ops.moves import Moves
from flashbone.variants.base import Variant
from helpers.adapter_folders import tiny_llama
from helpers.comparison import Promise, close, same_bits


class Alternating(Variant):
    """`u = S'(x) B`, where S' adds the even shards and subtracts the odd ones: of rank r, as bone is."""

    name = "alternating"
    is_low_rank = True

    def block_shape(self, out_features: int, in_features: int, r: int, mini_r: int) -> tuple[int, ...]:
        return r, out_features

    def rows(self, block: Float[Tensor, "r out"], start: int, stop: int) -> Float[Tensor, "r rows"]:
        return block[:, start:stop]

    def move(self, moves: Moves, x: Tensor, block: Tensor, scale: float) -> None:
        moves.add_factors(x * self._signs(x.shape[-1], block), block, scale)

    def delta(self, W: Float[Tensor, "out in"], block: Float[Tensor, "r out"]) -> Float[Tensor, "out in"]:
        return shards.tile(block.mT, W.shape[1]) * self._signs(W.shape[1], block)

    def factors(self, block: Float[Tensor, "r out"], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        eye = torch.eye(block.shape[0], dtype=block.dtype, device=block.device)
        return shards.tile(eye, in_features) * self._signs(in_features, block), block.mT

    def _signs(self, in_features: int, block: Tensor) -> Float[Tensor, "in"]:
        shard = torch.arange(in_features, device=block.device) // block.shape[0]
        return (1 - 2 * (shard % 2)).to(block.dtype)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, Alternating.name, Alternating)


@pytest.fixture
def trained():
    """A tiny Llama with a trained adapter, its base's weights before, and its losses."""
    torch.manual_seed(0)
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, BoneConfig(variant="alternating", r=6, target_modules=["q_proj", "down_proj"]))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    ids = torch.randint(0, base.config.vocab_size, (2, 12))
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return model.eval(), before, losses, ids


def test_it_trains_merges_and_comes_out_again_bit_for_bit(trained):
    model, before, losses, ids = trained
    assert losses[-1] < losses[0] - 0.1
    want = model(input_ids=ids).logits
    model.merge_adapter()
    assert close(model(input_ids=ids).logits, want, torch.float32)
    model.unmerge_adapter()
    for name, tensor in model.get_base_model().state_dict().items():
        if "bone_" not in name:
            assert same_bits(tensor, before[name.replace("base_layer.", "")], Promise.UNTOUCHED)


def test_it_is_saved_loaded_and_merged_on_disk_as_live(trained, tmp_path):
    model, before, _, ids = trained
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_llama()
    base.load_state_dict(before)
    base.save_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert close(again(input_ids=ids).logits, want, torch.float32)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    live = again.merge_and_unload()
    on_disk = type(live).from_pretrained(tmp_path / "merged")
    for name, tensor in live.state_dict().items():
        assert same_bits(on_disk.state_dict()[name], tensor, Promise.SAME_PRODUCT)


def test_it_is_read_converted_inspected_and_carded(trained, tmp_path, capsys):
    model, before, *_ = trained
    model.save_pretrained(tmp_path / "adapter")
    adapter = reading.read_adapter(tmp_path / "adapter")
    assert adapter.variant == Alternating()
    assert "`alternating` (Bone family)" in (tmp_path / "adapter" / "README.md").read_text()
    base = tiny_llama()
    base.load_state_dict(before)
    base.config.architectures = ["LlamaForCausalLM"]
    base.save_pretrained(tmp_path / "base")
    assert cli.main(["inspect", str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "alternating"
    assert (
        cli.main(["inspect", str(tmp_path / "base"), "--adapter.variant", "alternating", "--adapter.r", "6", "--json"])
        == 0
    )
    costs = json.loads(capsys.readouterr().out)
    assert costs
    assert (
        cli.main(
            [
                "convert",
                str(tmp_path / "adapter"),
                str(tmp_path / "lora"),
                "--to",
                "lora",
                "--base",
                str(tmp_path / "base"),
            ]
        )
        == 0
    )
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    ids = torch.arange(12)[None]
    assert close(lora(input_ids=ids).logits, model(input_ids=ids).logits, torch.float32)
