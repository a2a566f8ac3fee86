"""RWKV models that generate: the most likely tokens of the reference, from padded prompts, states and beams."""

import copy

import pytest
import torch
from rwkv_cases import LIMIT, differs_by

from flashbone.errors import ConfigError
from flashbone.generation.speaker import CACHE


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_state_is_taken_by_both_names_that_transformers_gives_it(one, name):
    _, model, tokens, _ = one
    prefix = model(tokens[:, :40], use_cache=True).past_key_values
    got = model(tokens[:, 40:], **{name: prefix}).logits
    assert differs_by(got[0], model(tokens).logits[0, 40:]) < LIMIT
    assert prefix.tokens_seen == tokens.shape[1]
    prefix = model(tokens[:, :40], use_cache=True).past_key_values
    headless = model.base_model(tokens[:, 40:], **{name: prefix}).last_hidden_state
    assert differs_by(model.head(headless)[0], got[0]) < LIMIT


def test_a_state_given_by_both_names_is_refused(one):
    _, model, tokens, _ = one
    prefix = model(tokens[:, :40], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="two names of one state; give it by one of them"):
        model(tokens[:, 40:], past_key_values=prefix, cache=prefix)
    assert prefix.tokens_seen == 40


@torch.no_grad()
def test_a_copied_state_serves_several_continuations(one):
    _, model, tokens, want = one
    prefix = model(tokens[:, :40], use_cache=True).past_key_values
    for _ in range(2):
        got = model(tokens[:, 40:], past_key_values=copy.deepcopy(prefix)).logits[0]
        assert differs_by(got, want[40:]) < LIMIT


@torch.no_grad()
def test_generation_takes_the_most_likely_tokens_of_the_reference(one):
    _, model, tokens, _ = one
    prompt, new = tokens[:, :12], 9
    got = model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None)
    assert got.shape == (1, 12 + new)
    for length in range(12, 12 + new):
        assert got[0, length] == model(got[:, :length]).logits[0, -1].argmax()


@torch.no_grad()
def test_generation_from_padded_prompts_equals_that_from_each_alone(one):
    _, model, tokens, _ = one
    prompts = [tokens[:, :5], tokens[:, 5:17]]
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(p, **options)[0, p.shape[1] :] for p in prompts]
    short = torch.nn.functional.pad(prompts[0], (7, 0))
    mask = torch.tensor([[0] * 7 + [1] * 5, [1] * 12])
    # Token by token the most likely one leads by 1e-3 of the logits' RMS and more: far more than rounding changes them.
    together = model.generate(torch.cat([short, prompts[1]]), attention_mask=mask, **options)
    assert together[:, 12:].tolist() == torch.stack(alone).tolist()
    short, mask = short.roll(5, 1), torch.cat([mask[:1].flip(1), mask[1:]])
    right = model.generate(torch.cat([short, prompts[1]]), attention_mask=mask, **options)
    assert right[:, 12:].tolist() == torch.stack(alone).tolist()
    without_cache = model.generate(prompts[1], use_cache=False, **options)
    assert without_cache[0, 12:].tolist() == alone[1].tolist()


@torch.no_grad()
def test_generation_goes_on_from_a_given_state(one):
    _, model, tokens, _ = one
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(tokens[:, :20], **options)
    prefix = model(tokens[:, :12], use_cache=True).past_key_values

    def from_prefix(given, mask=None):
        return model.generate(given, attention_mask=mask, **{CACHE: copy.deepcopy(prefix)}, **options)[:, -5:]

    assert from_prefix(tokens[:, :20]).tolist() == want[:, -5:].tolist()
    assert from_prefix(tokens[:, 12:20], torch.ones(1, 20)).tolist() == want[:, -5:].tolist()
    for given in (tokens[:, 12:20], tokens[:, 8:20]):  # of which transformers would leave out four, and none
        for mask in (None, torch.ones_like(given)):
            with pytest.raises(ConfigError, match="past_key_values has seen as many tokens as were given, or more"):
                from_prefix(given, mask)
    embedded = model.generate(inputs_embeds=model.emb(tokens[:, :20]), **options)
    assert embedded.tolist() == want[:, -5:].tolist()


@torch.no_grad()
def test_beams_carry_their_own_states(one):
    _, model, tokens, _ = one
    options = {"max_new_tokens": 6, "num_beams": 4, "eos_token_id": None, "do_sample": False}
    with_state = model.generate(tokens[:, :10], **options)
    assert with_state.tolist() == model.generate(tokens[:, :10], use_cache=False, **options).tolist()


@torch.no_grad()
def test_several_answers_to_one_prompt_begin_from_one_state(one):
    _, model, tokens, _ = one
    torch.manual_seed(0)
    got = model.generate(tokens[:, :10], max_new_tokens=4, num_return_sequences=3, do_sample=True, eos_token_id=None)
    assert got.shape == (3, 14)
