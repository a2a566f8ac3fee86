"""RWKV-7 and RWKV-6 against the `rwkv` package, and as models of transformers."""

import copy

import pytest
import torch
from rwkv_cases import LIMIT, TOKENS, differs_by
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from flashbone.errors import ConfigError, ShapeError
from flashbone.rwkv import Rwkv6Config, Rwkv7Config, RwkvState, from_pth, to_pth
from helpers.comparison import Promise, close, same_bits
from helpers.rwkv import VOCABULARY


@torch.no_grad()
def test_logits_equal_those_that_the_rwkv_package_gave(one):
    _, model, tokens, want = one
    assert differs_by(model(tokens).logits[0], want) < LIMIT


@pytest.mark.slow
@torch.no_grad()
def test_logits_equal_the_rwkv_package_s_for_whole_sequences(cases):
    for path, tokens, steps, whole in cases[1]:
        got = from_pth(path)(torch.tensor([tokens])).logits[0]
        assert differs_by(got, whole) < LIMIT, path
        assert differs_by(got, steps) < LIMIT, path


@pytest.mark.slow
@torch.no_grad()
def test_logits_equal_the_rwkv_package_s_token_by_token(cases):
    for path, tokens, steps, _ in cases[1]:
        model, state, rows = from_pth(path), None, []
        for token in tokens:
            out = model(torch.tensor([[token]]), past_key_values=state, use_cache=True)
            state = out.past_key_values
            rows.append(out.logits[0, -1])
        assert differs_by(torch.stack(rows), steps) < LIMIT, path
        assert state.get_seq_length() == len(tokens)


@torch.no_grad()
@pytest.mark.parametrize(("before", "after"), [(9, 0), (0, 9), (4, 40)])
def test_padding_on_either_side_changes_no_token(one, before, after):
    _, model, tokens, want = one
    padded = torch.nn.functional.pad(tokens, (before, after), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (before, after))
    out = model(torch.cat([padded, padded.flip(1)]), attention_mask=torch.cat([mask, mask.flip(1)]), use_cache=True)
    assert differs_by(out.logits[0, before : before + TOKENS], want) < LIMIT
    bare = model(tokens, use_cache=True).past_key_values
    for padded_layer, bare_layer in zip(out.past_key_values.layers, bare.layers, strict=True):
        for got, wanted in zip(padded_layer, bare_layer, strict=True):
            assert close(got[:1], wanted, torch.float32)


@torch.no_grad()
def test_padding_inside_a_sequence_is_passed_over(one):
    _, model, tokens, want = one
    gap = torch.full((1, 6), 2)
    broken = torch.cat([tokens[:, :30], gap, tokens[:, 30:]], dim=1)
    mask = torch.ones_like(broken)
    mask[:, 30:36] = 0
    got = model(broken, attention_mask=mask).logits
    assert differs_by(torch.cat([got[0, :30], got[0, 36:]]), want) < LIMIT


@torch.no_grad()
def test_a_sequence_in_pieces_of_any_length_gives_the_same_logits(one):
    _, model, tokens, want = one
    state, rows = RwkvState(), []
    for piece in tokens.split([1, 31, 33, 2, 8], dim=1):
        rows.append(model(piece, past_key_values=state).logits[0])
    assert differs_by(torch.cat(rows), want) < LIMIT


@torch.no_grad()
def test_a_state_has_one_size_however_long_the_sequence_is(one):
    """No view of it keeps a whole sequence's activations."""
    _, model, tokens, _ = one
    for mask in (None, torch.arange(75).unsqueeze(0) > 4):
        state = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        for layer in state.layers:
            assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in layer)


@torch.no_grad()
def test_a_column_of_padding_repeats_the_token_before_it(one):
    _, model, tokens, _ = one
    mask = torch.ones_like(tokens)
    mask[:, 30:36] = mask[:, :4] = 0
    got = model(tokens, attention_mask=mask).logits[0]
    assert close(got[30:36], got[29:30].expand(6, -1))
    assert got.isfinite().all()


@torch.no_grad()
def test_no_tokens_leave_a_state_as_it_is(one):
    _, model, tokens, _ = one
    state = model(tokens, use_cache=True).past_key_values
    before = copy.deepcopy(state)
    assert model(tokens[:, :0], past_key_values=state).logits.shape == (1, 0, VOCABULARY)
    for layer, other in zip(state.layers, before.layers, strict=True):
        assert all(same_bits(*parts, Promise.STORED) for parts in zip(layer, other, strict=True))


def test_a_saved_model_is_the_same_model(one, tmp_path):
    _, model, tokens, want = one
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    for name, tensor in model.state_dict().items():
        assert same_bits(again.state_dict()[name], tensor, Promise.STORED), name
    with torch.no_grad():
        assert differs_by(again(tokens).logits[0], want) < LIMIT


@torch.no_grad()
def test_bf16_and_fp64_models_keep_their_precision(one):
    _, model, tokens, want = one
    half = copy.deepcopy(model).to(torch.bfloat16)
    out = half(tokens, use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.past_key_values.layers[0].wkv.dtype == torch.float32
    assert 1e-4 < differs_by(out.logits[0].float(), want) < 0.3
    double = copy.deepcopy(model).double()
    out = double(tokens, use_cache=True)
    assert out.past_key_values.layers[0].wkv.dtype == torch.float64
    assert differs_by(out.logits[0].float(), want) < LIMIT


@torch.no_grad()
def test_autocast_leaves_the_state_in_fp32(one):
    _, model, tokens, want = one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens, use_cache=True)
    assert out.past_key_values.layers[-1].wkv.dtype == torch.float32
    assert 1e-4 < differs_by(out.logits[0].float(), want) < 0.3


def test_the_backbone_and_the_head_are_the_model(one):
    _, model, tokens, _ = one
    with torch.no_grad():
        out = model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        logits = model.get_output_embeddings()(out.last_hidden_state)
        assert same_bits(logits, model(tokens).logits, Promise.SAME_PRODUCT)
        assert out.past_key_values is None
        whole = model(tokens, output_hidden_states=True)
        assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
        assert same_bits(whole.hidden_states[-1], out.last_hidden_state, Promise.SAME_PRODUCT)
        assert close(model(tokens, logits_to_keep=2).logits, whole.logits[:, -2:])
        assert same_bits(model(inputs_embeds=model.emb(tokens)).logits, whole.logits, Promise.SAME_PRODUCT)
        assert same_bits(model(tokens, return_dict=False)[0], whole.logits, Promise.SAME_PRODUCT)


def test_wrong_calls_are_refused(one):
    _, model, tokens, _ = one
    with pytest.raises(ConfigError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ShapeError, match=r"attention_mask: got shape \(1, 3\), wanted \(1, 75\)"):
        model(tokens, attention_mask=torch.ones(1, 3))
    with pytest.raises(ShapeError, match=r"attention_mask: got shape \(1, 75\), wanted \(2, 75\)"):
        model(tokens.repeat(2, 1), attention_mask=torch.ones(1, 75))  # would be the first row's mask for both
    with pytest.raises(ConfigError, match="past_key_values: got a DynamicCache, wanted the RwkvState"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ShapeError, match="past_key_values: got the state of 1 rows, wanted 2"):
        model(tokens.repeat(2, 1), past_key_values=model(tokens, use_cache=True).past_key_values)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"got a state in torch.float32, of a model that computes in torch.bfloat16"):
        half(tokens, past_key_values=model(tokens, use_cache=True).past_key_values)
    short = torch.tensor([[0, 0, 1, 0, 1]])
    with pytest.raises(ConfigError, match="several sequences are packed into one row"):
        model(tokens[:, :5], position_ids=short)
    before = torch.tensor([[1, 1, 0, 1, 2]])  # as generate counts padded prompts
    assert (
        model(tokens[:, :5], position_ids=before, attention_mask=torch.tensor([[0, 0, 1, 1, 1]])).logits.shape[1] == 5
    )
    packed = torch.cat([torch.arange(40), torch.arange(35)]).unsqueeze(0)
    for call in (model, model.base_model):
        with pytest.raises(ConfigError, match="several sequences are packed into one row"):
            call(tokens, position_ids=packed)
    assert model(tokens, position_ids=torch.arange(75).unsqueeze(0)).logits.shape[1] == 75
    padded = torch.cat([torch.arange(70), torch.zeros(5, dtype=torch.long)]).unsqueeze(0)
    mask = torch.ones_like(padded)
    mask[:, 70:] = 0
    assert model(tokens, attention_mask=mask, position_ids=padded).logits.shape[1] == 75
    packed[:, 75:] = 0
    with pytest.raises(ConfigError, match="several sequences are packed into one row"):
        model(tokens, attention_mask=mask, position_ids=packed)
    for config in (Rwkv7Config, Rwkv6Config):
        with pytest.raises(ConfigError, match="head_size: got 48, which does not divide the hidden size of 64"):
            config(hidden_size=64, head_size=48)
        with pytest.raises(ConfigError, match="wkv_backend: got 'cuda', wanted one of auto, torch, fla"):
            config(wkv_backend="cuda")
        with pytest.raises(
            ConfigError, match="tie_word_embeddings: got True; an RWKV model has an embedding and a head"
        ):
            config(tie_word_embeddings=True)


def test_a_resized_vocabulary_keeps_its_rows(one, tmp_path):
    _, model, tokens, want = one
    model = copy.deepcopy(model)
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    with torch.no_grad():
        assert differs_by(model(tokens).logits[0, :, :VOCABULARY], want) < LIMIT
    to_pth(model, tmp_path / "wider.pth")
    assert from_pth(tmp_path / "wider.pth").config.vocab_size == VOCABULARY + 8
