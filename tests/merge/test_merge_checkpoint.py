"""`merge_checkpoint` against the live model's merge, the fp64 reference, and the bytes of the base."""

import copy
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AlbertForMaskedLM, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from flashbone import BoneConfig
from flashbone.merge import merge_checkpoint
from golden.cases import CASES as GOLDEN_CASES
from helpers import reference
from helpers.adapter_folders import blocks_for, listing, tiny_bert, tiny_gpt2, tiny_llama, write_adapter
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, relative_error, same_bits
from helpers.mlp import MLP

# PEFT reads an attribute that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def _assert_equal(got: torch.nn.Module, want: torch.nn.Module) -> None:
    got_state, want_state = got.state_dict(), want.state_dict()
    assert got_state.keys() == want_state.keys()
    assert [k for k, w in want_state.items() if not same_bits(got_state[k], w, Promise.SAME_PRODUCT)] == []


CASES = {
    "llama": (tiny_llama, AutoModelForCausalLM, ["q_proj", "k_proj", "down_proj"], {"rank_pattern": {"down_proj": 5}}),
    "gpt2": (tiny_gpt2, AutoModelForCausalLM, ["c_attn", "c_proj"], {"bias": "all"}),
    "bert": (tiny_bert, AutoModelForSequenceClassification, ["query", "dense"], {"bias": "bone_only"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("case", CASES)
def test_the_folder_equals_the_live_merge_bit_for_bit(tmp_path, case, variant, dtype):
    make, auto, targets, fields = CASES[case]
    make().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="6KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    if case == "bert":
        fields = fields | {"modules_to_save": ["classifier", "LayerNorm"]}
    config = BoneConfig(r=6, variant=variant, mini_r=3, init_weights=False, target_modules=targets, **fields)
    live = get_peft_model(auto.from_pretrained(tmp_path / "base", dtype=dtype), config).eval()
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    live.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

    want = live.merge_and_unload()
    got = auto.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    _assert_equal(got, want)
    assert close(got(IDS).logits, want(IDS).logits)  # the weights of a file are aligned otherwise
    assert report.merged > 0
    assert (report.replaced > 0) == (case != "llama")
    assert report.merged + report.replaced + report.copied == len(_weights(tmp_path / "base"))
    assert report.bytes_written == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_merged_weights_are_those_of_the_fp64_reference(tmp_path, variant):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    blocks = blocks_for(base, variant, ("q_proj", "o_proj", "up_proj"), 6)
    write_adapter(tmp_path / "adapter", variant, blocks, r=6)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = _weights(tmp_path / "base"), _weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, W in before.items():
        block = blocks.get(name.removesuffix(".weight"))
        if block is None:
            assert same_bits(after[name], W, Promise.STORED)
        else:
            assert close(after[name], W.double() + reference.delta(variant, W, block))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_square_conv1d_is_merged_in_its_own_orientation(tmp_path, variant):
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    name = "transformer.h.0.attn.c_proj"
    blocks = {name: blocks_for(base, variant, ("c_proj",), 4)[name]}
    write_adapter(tmp_path / "adapter", variant, blocks, r=4)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    W, merged = _weights(tmp_path / "base")[f"{name}.weight"], _weights(tmp_path / "out")[f"{name}.weight"]
    assert W.shape == (16, 16)
    assert close(merged, W.double() + reference.delta(variant, W.mT, blocks[name]).mT)
    assert not close(merged, W.double() + reference.delta(variant, W, blocks[name]))


def test_an_adapter_of_a_model_with_a_head_merges_into_the_bare_encoder(tmp_path):
    encoder = tiny_bert(classifier=False)
    encoder.save_pretrained(tmp_path / "base")
    name = "encoder.layer.0.attention.self.query"
    block = torch.randn(4, 16)
    write_adapter(tmp_path / "adapter", "bone", {f"bert.{name}": block})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = AutoModel.from_pretrained(tmp_path / "out").get_submodule(name).weight
    W = encoder.get_submodule(name).weight
    assert close(got, W + reference.delta("bone", W, block), torch.float32)


def test_an_adapter_of_the_bare_model_merges_into_one_with_a_head(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    name = "layers.1.mlp.up_proj"
    write_adapter(tmp_path / "adapter", "bone", {name: torch.randn(4, 28)})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    changed = [k for k, W in _weights(tmp_path / "out").items() if not torch.equal(W, base.state_dict()[k])]
    assert changed == [f"model.{name}.weight"]


@pytest.mark.parametrize("shard_size", ["6KB", "1GB"])
def test_a_zero_adapter_gives_the_bytes_of_the_base(tmp_path, shard_size):
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    for name in ("tokenizer.model", "merges.txt", "training_args.bin", "pytorch_model.bin", "model.onnx"):
        (tmp_path / "base" / name).write_bytes(b"x")
    blocks = {name: torch.zeros_like(b) for name, b in blocks_for(base, "bat-col", ("c_proj",), 4).items()}
    write_adapter(tmp_path / "adapter", "bat-col", blocks)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    dropped = {"training_args.bin", "pytorch_model.bin", "model.onnx"}
    assert set(listing(tmp_path / "out")) == set(listing(tmp_path / "base")) - dropped | {"merge.json"}
    (tmp_path / "out" / "merge.json").unlink()
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "base" / file.name).read_bytes(), file.name


def test_files_beside_the_weights_come_along_and_stale_weights_do_not(tmp_path):
    base = tmp_path / "base"
    model = tiny_bert(classifier=False)
    model.save_pretrained(base)
    carried = [
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/config.json",
    ]
    stale = ["model.safetensors.index.json", "consolidated.safetensors", "original/weights.00.pth", "onnx/model.onnx"]
    stale += [
        "adapter_config.json",
        "adapter_model.safetensors",
        ".cache/huggingface/x",
        "checkpoint-5/trainer_state.json",
    ]
    for name in (*carried, *stale):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    write_adapter(tmp_path / "adapter", "bone", blocks_for(model, "bone", ("query",), 4))
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    files = [name for name in listing(tmp_path / "out") if (tmp_path / "out" / name).is_file()]
    assert files == sorted(["config.json", "merge.json", "model.safetensors", "modules.json", *carried])


def test_links_of_a_hub_cache_become_files(tmp_path):
    base, snapshot = tiny_llama(), tmp_path / "snapshots/1"
    base.save_pretrained(tmp_path / "blobs")
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    write_adapter(tmp_path / "adapter", "bone", blocks_for(base, "bone", ("q_proj",), 4))
    merge_checkpoint(snapshot, tmp_path / "adapter", tmp_path / "out")
    shutil.rmtree(tmp_path / "blobs")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_embeddings_saved_along_with_the_adapter_replace_those_of_the_base(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    embedding = torch.randn(50, 20)
    others = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    write_adapter(tmp_path / "adapter", "bone", blocks_for(base, "bone", ("q_proj",), 4), others=others)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.replaced == 1
    assert same_bits(got.lm_head.weight, embedding, Promise.STORED)
    assert got.lm_head.weight is got.model.embed_tokens.weight


def test_an_adapted_head_that_is_not_tied_is_merged(tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    config = BoneConfig(r=4, init_weights=False, target_modules=["lm_head"])
    live = get_peft_model(copy.deepcopy(base), config)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        live.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (report.merged, report.replaced) == (1, 0)
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), live.merge_and_unload())


def test_an_existing_but_empty_out_is_filled(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", blocks_for(base, "bone", ("q_proj",), 4))
    (tmp_path / "out").mkdir()
    merge_checkpoint(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "runs" / "deep" / "out")
    assert (tmp_path / "runs" / "deep" / "out" / "config.json").is_file()
    assert not list(tmp_path.rglob("*.partial"))


def test_progress_counts_every_byte(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", blocks_for(base, "bone", ("q_proj",), 4))
    seen = []
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", lambda *a: seen.append(a))
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes_written, report.bytes_written)


def test_a_real_albert_with_shared_layers_merges_like_the_live_model(tmp_path):
    spec = find_spec("rxnmapper")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "models/transformers/albert_heads_8_uspto_all_1310k"
    AlbertForMaskedLM.from_pretrained(source).save_pretrained(tmp_path / "base")
    config = BoneConfig(r=16, variant="bat-row", init_weights=False, target_modules=["query", "value", "ffn"])
    live = get_peft_model(AlbertForMaskedLM.from_pretrained(tmp_path / "base"), config).eval()
    live.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    want, got = live.merge_and_unload(), AlbertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert report.merged == 3
    _assert_equal(got, want)
    assert relative_error(got(IDS).logits, want(IDS).logits) < 1e-5  # twelve layers' rounding


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_adapters_of_peft_018_merge_to_its_own_merged_weights(tmp_path, name):
    adapter = Path(__file__).parents[1] / "golden" / "peft-0.18.1" / name
    (tmp_path / "base").mkdir()
    save_file(MLP(GOLDEN_CASES[name][0]).state_dict(), tmp_path / "base" / "model.safetensors")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    got = _weights(tmp_path / "out")
    for key, want in load_file(adapter / "expected.safetensors").items():
        if key.startswith("merged:"):
            assert close(got[key.removeprefix("merged:")], want)


def test_a_merged_folder_takes_a_further_adapter_in_peft(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", blocks_for(base, "bone", ("q_proj",), 4), target_modules=["q_proj"])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "adapter")
    assert again(IDS).logits.isfinite().all()
