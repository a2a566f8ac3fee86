"""RWKV models that learn: every parameter, by checkpointing, and through the state that pieces pass on."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from flashbone.rwkv import Rwkv6Config, Rwkv7Config, RwkvState
from helpers.checkpointing import enable_checkpointing
from helpers.comparison import close
from helpers.rwkv import VOCABULARY


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(one, reentrant):
    _, model, tokens, _ = one
    model = copy.deepcopy(model).train()
    want = gradients(model, tokens)
    enable_checkpointing(model, reentrant)
    model.enable_input_require_grads()
    got = gradients(model, tokens)
    assert want.keys() == got.keys()
    for name, grad in want.items():
        assert close(got[name], grad, torch.float32), name


def gradients(model, tokens, labels=None, **inputs):
    model.zero_grad()
    model(tokens, labels=tokens if labels is None else labels, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_is_trained_but_what_the_first_block_does_not_use(one):
    version, model, tokens, _ = one
    model = copy.deepcopy(model).double().train()
    unused = {name for name, p in model.named_parameters()} - gradients(model, tokens).keys()
    assert unused == ({f"blocks.0.att.v{i}" for i in range(3)} if version == 7 else set())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_passing_the_state_on_gives_the_gradients_of_one_long_sequence(one, checkpointed):
    _, model, tokens, _ = one
    model = copy.deepcopy(model).double().train()
    rows = torch.cat([tokens, tokens.roll(11, 1)])
    mask = torch.ones_like(rows)
    mask[0, 60:] = mask[1, :22] = 0
    labels = rows.masked_fill(mask == 0, -100)
    want = gradients(model, rows, labels, attention_mask=mask)
    if checkpointed:
        enable_checkpointing(model)
    model.chunk_ctx = 19  # four chunks
    got = gradients(model, rows, labels, attention_mask=mask)
    assert want.keys() == got.keys()
    for name, grad in want.items():
        assert close(got[name], grad, torch.float64), name


def test_a_cut_gradient_is_that_of_pieces_that_start_from_a_detached_state(one):
    _, model, tokens, _ = one
    model = copy.deepcopy(model).double().train()
    whole = gradients(model, tokens)
    model.chunk_ctx, model.carries_gradient = 19, False
    got = gradients(model, tokens)
    model.zero_grad()
    state = RwkvState()
    hidden = []
    model.chunk_ctx = None
    for piece in tokens.split(19, dim=1):
        hidden.append(model.backbone(piece, past_key_values=state).last_hidden_state)
        state = state.detach()
    logits = model.head(torch.cat(hidden, 1))
    model.loss_function(logits=logits, labels=tokens, vocab_size=VOCABULARY).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert close(got[name], p.grad, torch.float64), name
    name = "blocks.1.att.key.weight"
    assert not close(got[name], whole[name], torch.float32)


def test_state_passing_keeps_only_one_piece_in_memory(one):
    _, model, tokens, _ = one
    model = copy.deepcopy(model).train()

    def kept(chunk_ctx):
        model.chunk_ctx = chunk_ctx
        sizes = []
        rows = tokens.repeat(1, 8)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.backbone(rows)
        return sum(sizes)

    assert kept(25) < kept(None) / 20


@pytest.mark.parametrize("config", [Rwkv7Config, Rwkv6Config])
def test_a_random_start_is_finite_and_learns(config):
    model = AutoModelForCausalLM.from_config(
        config(vocab_size=20, hidden_size=32, head_size=16, num_hidden_layers=2)
    ).train()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    tokens = torch.randint(0, 20, (2, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
