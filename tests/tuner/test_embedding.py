"""Embeddings with adapters: a linear layer on one-hot rows, with the ids cut into shards."""

import copy
import warnings

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn
from transformers import BartConfig, BartModel, Gemma3ForCausalLM, Gemma3TextConfig

from flashbone.errors import ConfigError, FormatError
from flashbone.merge import merge_checkpoint
from flashbone.tuner.layers.embedding import BoneEmbedding
from helpers.adapter_folders import tiny_gpt2, tiny_llama
from helpers.comparison import Promise, close, same_bits
from helpers.layers import adapted, check_lifecycle, gradients, oracle_weight
from helpers.mlp import fill_blocks

IDS = torch.tensor([[0, 3, 9], [4, 4, 10]])
KINDS = {"plain": {}, "padded": {"padding_idx": 4}, "sparse": {"sparse": True}, "by freq": {"scale_grad_by_freq": True}}


def layer(base: nn.Module, variant: str = "bone", r: int = 3, **fields) -> BoneEmbedding:
    made = BoneEmbedding(base.requires_grad_(False), "x", r=r, variant=variant, mini_r=2, **fields)
    fill_blocks(made)
    return made


@pytest.mark.parametrize("variant", ["bone", "mini"])
@pytest.mark.parametrize("r", [3, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_transposed_table(kind, r, variant):
    made = layer(nn.Embedding(11, 5, **KINDS[kind]).double(), variant, r).double()
    made.set_scale("x", -0.7)
    block = made.bone_block["x"]
    want_block = block.detach().clone().requires_grad_(True)
    table = oracle_weight(made.weight.T, variant, want_block, -0.7).T
    got, want = made(IDS), nn.functional.one_hot(IDS, 11).double() @ table
    assert close(got, want)
    assert close(gradients(got, [block])[0], gradients(want, [want_block])[0])
    assert close(made.get_delta_weight("x"), (table - made.weight).detach())
    made.merge()
    assert close(made(IDS), want)  # the row of padding_idx, too
    assert close(made(IDS.int()), want)


def test_mixed_adapters_live_as_on_a_linear_layer(tmp_path):
    base = nn.ModuleDict({"words": nn.Embedding(11, 5)}).double()
    check_lifecycle(
        adapted(copy.deepcopy(base), "bone", "mini", target_modules=["words"]),
        lambda m: (m.base_model.model if hasattr(m, "base_model") else m)["words"](IDS).detach(),
        lambda: copy.deepcopy(base),
        tmp_path,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    made = layer(nn.Embedding(11, 5).to(dtype))
    want = oracle_weight(made.weight.T, "bone", made.bone_block["x"].detach()).T[IDS]
    assert made(IDS).dtype == dtype
    assert close(made(IDS), want)


def test_dropout_drops_the_shift_of_whole_tokens():
    made = layer(nn.Embedding(11, 5).double(), dropout=0.5).double()
    ids = torch.arange(11).repeat(40)
    shift = made(ids) - made.base_layer(ids)
    full = made.get_delta_weight("x")[ids]
    factors = shift / full
    assert close(factors, factors[:, :1].expand_as(factors))
    assert set(factors[:, 0].round(decimals=6).tolist()) == {0.0, 2.0}
    assert close(made.eval()(ids) - made.base_layer(ids), full)


def test_rows_of_a_batch_take_their_own_adapters():
    model = adapted(nn.ModuleDict({"words": nn.Embedding(11, 5)}), "bone", "mini", target_modules=["words"])
    model, made = model.eval().base_model, model.base_model.model["words"]
    want = []
    for row, name in enumerate(["y", "x"]):
        model.set_adapter(name)
        want.append(made(IDS[row : row + 1]))
    with model._enable_peft_forward_hooks(adapter_names=["y", "x", "__base__"]):
        got = made(torch.cat([IDS, IDS[:1]]))
    assert close(got, torch.cat([*want, made.base_layer(IDS[:1])]))


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (
            {},
            {"variant": "bat-row"},
            "words: the variant 'bat-row' multiplies the weight of Embedding, all of its 11 ",
        ),
        ({}, {"variant": "bat-col"}, "use 'bone' or 'mini'"),
        ({}, {"variant": "orthogonal"}, "use 'bone' or 'mini'"),
        ({"max_norm": 1.0}, {}, r"words: Embedding has max_norm=1.0.* set its max_norm to None"),
    ],
)
def test_what_embeddings_cannot_have_is_refused_by_name(base, fields, message):
    model = nn.ModuleDict({"words": nn.Embedding(11, 5, **base)})
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, BoneConfig(r=2, target_modules=["words"], **fields))
    assert type(model["words"]) is nn.Embedding


def test_scaled_embeddings_scale_the_shift_as_well():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4}
    config = Gemma3TextConfig(vocab_size=30, num_attention_heads=2, num_key_value_heads=1, **sizes)
    config.tie_word_embeddings = False
    model = adapted(Gemma3ForCausalLM(config).eval(), "bone", target_modules=["embed_tokens"])
    ids = torch.randint(0, 30, (2, 5))
    with torch.no_grad():
        want = model(ids).logits
        assert not close(want, model.base_model.model(ids).logits * 0)
        assert close(model.merge_and_unload()(ids).logits, want)


def test_positions_that_an_embedding_makes_itself_are_adapted_and_refuse_dropout():
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = BartConfig(vocab_size=30, max_position_embeddings=16, decoder_attention_heads=2, **sizes)
    config.encoder_ffn_dim = config.decoder_ffn_dim = 12
    base = BartModel(config).eval()
    ids = torch.randint(3, 30, (2, 5))
    plain = base(ids).last_hidden_state
    model = adapted(base, "bone", target_modules=["embed_positions"])
    got = model(ids).last_hidden_state
    got.square().sum().backward()
    assert not close(got, plain)
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert close(model.merge_and_unload()(ids).last_hidden_state, got)
    with pytest.raises(ConfigError, match="BartLearnedPositionalEmbedding has a forward of its own"):
        get_peft_model(BartModel(config), BoneConfig(r=2, dropout=0.1, target_modules=["embed_positions"]))


def test_an_adapter_on_a_tied_embedding_leaves_the_head_alone():
    base, ids = tiny_gpt2(), torch.randint(0, 50, (2, 6))
    head = base.lm_head.weight.clone()
    hidden = base.transformer(ids).last_hidden_state
    model = adapted(base, "bone", target_modules=["wte"])
    assert not close(model.base_model.model.transformer(ids).last_hidden_state, hidden)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert same_bits(base.lm_head.weight, head, Promise.UNTOUCHED)


@pytest.mark.parametrize("square", [False, True])
def test_files_say_that_the_table_is_transposed_and_merge_exactly(square, tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    if square:  # a shape that says nothing
        base.resize_token_embeddings(20)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, "bone", target_modules=["embed_tokens", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(tmp_path / "adapter", selected_adapters=["x"])
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter" / "x", tmp_path / "out")
    merged = type(base).from_pretrained(tmp_path / "out").state_dict()
    assert report.merged == 3
    live = model.merge_and_unload().state_dict()
    assert all(same_bits(merged[name], live[name], Promise.SAME_PRODUCT) for name in live)


def test_a_file_for_a_tied_table_is_not_merged_into_it(tmp_path):
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, "bone", target_modules=["wte"])
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["x"], save_embedding_layers=False)
    with pytest.raises(FormatError, match=r"transformer.wte: the base ties its output embedding to the input emb"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter" / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_table_is_not_saved_with_its_adapter(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 6)), BoneConfig(r=4, target_modules=["0"], init_weights=False))
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"an embedding is merged.*call unmerge_adapter\(\) first"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
