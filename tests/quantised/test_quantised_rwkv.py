"""QBone on RWKV: .pth models in nf4 and int8, trained with every variant, merged into the file as it is."""

import json

import pytest
import torch
from peft import BoneConfig, get_peft_model

from flashbone.rwkv import from_pth
from flashbone.train.recipe import DataRecipe, Recipe
from helpers.comparison import Promise, same_bits
from helpers.rwkv import write_rwkv

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; `make test-all` brings it")
pytestmark = [
    pytest.mark.beside,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
    pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning"),  # peft looks for one
    # bitsandbytes 0.50 says so of each int8 product on fp32 inputs
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]
VARIANTS = ["bone", "mini", "bat-row", "bat-col", "orthogonal"]


def quantisation(bits):
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(params=[(7, 4), (6, 4), (7, 8)], ids=["v7-nf4", "v6-nf4", "v7-int8"])
def quantised(request, tmp_path):
    version, bits = request.param
    path = write_rwkv(tmp_path / "base.pth", version, hidden=64, head=16, layers=2, inner=256)
    return path, bits, from_pth(path, dtype=torch.float32, quantization_config=quantisation(bits))


def test_the_projections_are_quantised_and_nothing_else(quantised):
    path, bits, model = quantised
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    wanted = {"Linear4bit"} if bits == 4 else {"Linear8bitLt"}
    assert {kind for name, kind in kinds.items() if ".att." in name or ".ffn." in name} - {"HeadNorm"} == wanted
    assert kinds["head"] == "Linear"
    tokens = torch.arange(1, 30).unsqueeze(0)
    with torch.no_grad():
        got, want = model(tokens).logits, from_pth(path)(tokens).logits
    assert 1e-4 < (got - want).norm() / want.norm() < 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_on_a_quantised_model(quantised, variant):
    _, _, model = quantised
    adapted = get_peft_model(model, BoneConfig(variant=variant, r=8, mini_r=1, target_modules="all-linear")).train()
    tokens = torch.arange(1, 33).view(2, 16)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_a_run_merges_into_the_file_as_it_is(tmp_path):
    from flashbone.train.run import train

    base = write_rwkv(tmp_path / "base.pth", 7, hidden=32, layers=2, vocabulary=260)
    vocabulary = tmp_path / "bytes.txt"
    vocabulary.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f" {i}."}) + "\n" for i in range(20)))
    recipe = Recipe(
        model=str(base),
        data=DataRecipe(str(data), eval=4),
        output=str(tmp_path / "run"),
        adapter={"r": 8},
        training={"max_steps": 6, "learning_rate": 1e-2, "disable_tqdm": True},
        quantization={"bits": 4},
        rwkv={"vocabulary": str(vocabulary)},
        merge=True,
    )
    summary = train(recipe).summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1
    merged = torch.load(tmp_path / "run" / "merged.pth", weights_only=True)
    for name, tensor in torch.load(base, weights_only=True).items():
        is_adapted = name.endswith(("receptance.weight", "key.weight", "value.weight", "output.weight"))
        assert same_bits(merged[name], tensor, Promise.STORED) != is_adapted, name
        assert (merged[name] - tensor).abs().max() < 0.2
