"""transformers' own RWKV (version 4), which rescales weights in place in eval mode: adapters by names, and the same
outputs as of the merged weights in either mode."""

import copy
import pickle

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

from flashbone import BoneLayer, merge_checkpoint
from flashbone.errors import ConfigError
from flashbone.merge.verify import compare_logits
from flashbone.tuner.hosts import rwkv_hosts
from flashbone.tuner.model.targets import resolved
from helpers import reference
from helpers.checkpointing import enable_checkpointing
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks

pytestmark = pytest.mark.slow

VARIANTS = ["bone", "mini", "bat-row", "bat-col", "orthogonal"]
NAMES = ["attention.receptance", "attention.key", "attention.value", "attention.output"]
NAMES += ["feed_forward.key", "feed_forward.receptance", "feed_forward.value"]
LAYERS, EVERY = 5, 2  # the last block is divided by 4
TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


def base_model(seed: int = 0, every: int = EVERY) -> RwkvForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "context_length": 16}
    tokens = {"bos_token_id": 1, "eos_token_id": 29}
    return RwkvForCausalLM(RwkvConfig(num_hidden_layers=LAYERS, rescale_every=every, **sizes, **tokens))


def config(variant: str = "bone", targets: list[str] | str = NAMES, **fields) -> BoneConfig:
    mini = {"mini_r": 2} if variant == "mini" else {}
    return BoneConfig(r=4, variant=variant, target_modules=targets, **mini, **fields)


def adapted(variant: str = "bone", base: nn.Module | None = None, **fields) -> PeftModel:
    model = get_peft_model(base_model() if base is None else base, config(variant, **fields))
    fill_blocks(model)
    return model


def layers(model: PeftModel) -> dict[str, BoneLayer]:
    named = model.base_model.model.named_modules()
    return {name: module for name, module in named if isinstance(module, BoneLayer)}


def run(model: nn.Module, train: bool = False) -> Tensor:
    with torch.no_grad():
        return model.train(train)(TOKENS).logits


def by_hand(model: PeftModel) -> RwkvForCausalLM:
    """A model of transformers alone whose weights are the sums W + delta(W)."""
    summed = base_model()
    for name, layer in layers(model).items():
        weight, block = summed.get_submodule(name).weight, layer.bone_block["default"]
        weight.data += reference.delta(layer.bone_variant["default"].name, weight.detach(), block.detach()).to(weight)
    return summed


def test_names_all_linear_and_nothing_mean_the_layers_of_all_blocks():
    wanted = {f"rwkv.blocks.{i}.{name}" for i in range(LAYERS) for name in NAMES}
    for targets in (NAMES, "all-linear", None, ["all-attention", "all-mlp"], ["receptance", "key", "value", "output"]):
        assert set(resolved(base_model(), config(targets=targets))) == wanted
        assert set(layers(get_peft_model(base_model(), config(targets=targets)))) == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss_and_changes_nothing_but_the_blocks(variant):
    model = get_peft_model(base_model(), config(variant)).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        run(model)  # an evaluation in between, after which training goes on
        model.train()
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"base_model.model.{name}.bone_block.default" for name in layers(model)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_summed_weights_in_either_mode(variant):
    model = adapted(variant)
    summed = by_hand(model)
    for train in (False, True, False):
        assert close(run(model, train), run(summed, train))
    assert not close(run(model), run(base_model()))


def test_without_what_follows_the_rescaling_they_are_not(monkeypatch):
    monkeypatch.setattr(rwkv_hosts, "settle", lambda model: None)
    model = adapted()
    want = by_hand(model)
    assert close(run(model, train=True), run(want, train=True))
    assert not close(run(model), run(want), torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_keeps_the_outputs_and_unmerging_gives_the_weights_back_bit_for_bit(variant):
    model = adapted(variant)
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    want = {train: run(model, train) for train in (False, True)}
    for merge_mode in (False, True, False):
        run(model, merge_mode)
        model.merge_adapter()
        for train in (not merge_mode, merge_mode):
            assert close(run(model, train), want[train])
        model.unmerge_adapter()
        assert all(
            same_bits(layer.base_layer.weight, weights[name], Promise.UNTOUCHED)
            for name, layer in layers(model).items()
        )
        assert same_bits(run(model), want[False], Promise.SAME_PRODUCT)


def test_a_model_that_was_merged_for_good_is_as_one_of_transformers_in_either_mode(tmp_path):
    model = adapted("bat-col")
    summed = by_hand(model)
    run(model)
    merged = model.merge_and_unload()
    assert all(close(parameter, summed.get_parameter(name)) for name, parameter in merged.named_parameters())
    for train in (False, True):
        assert close(run(merged, train), run(summed, train))
    merged.eval().save_pretrained(tmp_path)
    loaded = RwkvForCausalLM.from_pretrained(tmp_path)
    pairs = [(parameter, merged.get_parameter(name)) for name, parameter in loaded.named_parameters()]
    assert all(same_bits(one, other, Promise.STORED) for one, other in pairs)
    assert close(run(loaded), run(merged))  # loaded weights lie in memory as in the file


def test_the_disabled_adapter_leaves_the_base_bit_for_bit_in_either_mode():
    model, base = adapted(), base_model()
    for train in (False, True, False):
        with model.disable_adapter():
            assert same_bits(run(model, train), run(base, train), Promise.SAME_PRODUCT)
    unloaded = model.unload()
    assert all(same_bits(run(unloaded, train), run(base, train), Promise.SAME_PRODUCT) for train in (False, True))


def test_an_adapter_may_go_into_a_model_whose_weights_stand_rescaled():
    base = base_model()
    run(base)
    weight = base.rwkv.blocks[4].attention.output.weight
    assert same_bits(weight * 4, base_model().rwkv.blocks[4].attention.output.weight, Promise.EXACT)
    model = adapted(base=base)
    assert same_bits(weight, base_model().rwkv.blocks[4].attention.output.weight, Promise.EXACT)
    assert same_bits(run(model), run(adapted()), Promise.SAME_PRODUCT)


def test_rescaled_weights_that_are_quantised_are_refused_and_nothing_changes():
    base = base_model()
    run(base)
    base.rwkv.blocks[0].attention.output.weight.SCB = torch.ones(8)  # what marks bitsandbytes' weights
    want = run(base)
    with pytest.raises(ConfigError, match="RwkvModel was called in eval mode, which rescaled its quantised weights"):
        get_peft_model(base, config())
    assert not any(isinstance(module, BoneLayer) for module in base.modules())
    assert same_bits(run(base), want, Promise.SAME_PRODUCT)


def test_a_model_without_rescaling_stays_without():
    model = adapted(base=base_model(every=0))
    assert close(run(model), run(model, train=True))


def test_files_load_into_a_new_model_and_beside_another_adapter(tmp_path):
    model = adapted("bat-row")
    want = run(model)
    model.save_pretrained(tmp_path)
    assert same_bits(run(PeftModel.from_pretrained(base_model(), tmp_path)), want, Promise.SAME_PRODUCT)
    other = adapted("mini")
    run(other)
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    assert same_bits(run(other), want, Promise.SAME_PRODUCT)
    assert len(other.base_model.model.rwkv._forward_pre_hooks) == 1


def test_transformers_own_add_adapter_does_the_same():
    model = base_model()
    model.add_adapter(config())
    fill_blocks(model)
    assert same_bits(run(model), run(adapted()), Promise.SAME_PRODUCT)


def test_copies_and_pickles_are_models_of_their_own():
    model = adapted()
    want = {train: run(model, train) for train in (False, True)}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.train()
        assert all(same_bits(run(other, train), want[train], Promise.SAME_PRODUCT) for train in (False, True))


def test_tokens_one_by_one_with_the_state_give_the_outputs_of_the_whole_text():
    model = adapted().eval()
    state, logits = None, []
    for token in TOKENS[0]:  # one text: with more, transformers 5.23 mixes their states up
        out = model(token.view(1, 1), state=state, use_cache=True)
        state, logits = out.state, [*logits, out.logits]
    assert close(torch.cat(logits, 1), run(model)[:1])


def test_a_merged_model_generates_the_same_text():
    model = adapted().eval()
    settings = {"max_new_tokens": 8, "do_sample": False}
    text = model.generate(input_ids=TOKENS[:1], **settings)
    # The best token leads by 1e-3 at least, a thousand times what rounding moves.
    assert model.merge_and_unload().generate(input_ids=TOKENS[:1], **settings).tolist() == text.tolist()
    assert not torch.equal(base_model().eval().generate(input_ids=TOKENS[:1], **settings), text)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = adapted("bat-col").train()
        if checkpointing:
            enable_checkpointing(model.base_model.model)
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(same_bits(one, other, Promise.SAME_PRODUCT) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("variant", ["bone", "bat-col"])
def test_a_merge_on_disk_is_verified(variant, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    adapted(variant).save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert compare_logits(tmp_path / "base", [tmp_path / "adapter"], None, tmp_path / "merged").ok
