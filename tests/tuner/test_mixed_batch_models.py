"""Models whose rows go through different adapters: logits, generation, saved modules, wrong names."""

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from flashbone.errors import ConfigError, ShapeError
from flashbone.tuner.layers.calls import CURRENT
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **fields))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=24, n_layer=2, n_head=2))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def with_adapters(model: nn.Module, **fields):
    """The model with an adapter of each variant, named after it in capitals."""
    peft_model = None
    for variant in VARIANT_NAMES:
        name = variant.upper()
        config = BoneConfig(r=4, variant=variant, init_weights=False, target_modules="all-linear", **fields)
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    assert peft_model is not None
    fill_blocks(peft_model)
    return peft_model.eval()


NAMES = ["BAT-COL", "__base__", "BONE", "ORTHOGONAL", "MINI", "BONE", "BAT-ROW"]


def one_by_one(model, names: list[str], run) -> list:
    """`run(i)` for each row, with the row's adapter active or none."""
    results = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(i))
        else:
            model.set_adapter(name)
            results.append(run(i))
    return results


@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_of_a_mixed_batch_are_those_of_separate_runs(make):
    model = with_adapters(make())
    ids = torch.randint(0, 50, (len(NAMES), 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got = model(input_ids=ids, adapter_names=NAMES).logits
        want = torch.cat(one_by_one(model, NAMES, lambda i: model(input_ids=ids[i : i + 1]).logits))
        assert close(got, want)
        assert same_bits(model(input_ids=ids).logits, model(input_ids=ids).logits, Promise.SAME_PRODUCT)
    assert CURRENT.rows is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "fields"), [(llama, {}), (llama, {"num_beams": 4, "num_return_sequences": 2}), (t5, {"num_beams": 3})]
)
def test_generation_of_a_mixed_batch_is_that_of_separate_runs(make, fields):
    model = with_adapters(make().double())  # in which no near tie is decided by how a mixed batch rounds
    fields = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **fields}
    ids = torch.randint(5, 50, (len(NAMES), 5), generator=torch.Generator().manual_seed(3))
    # Both are batches, since a cache and a batch of one round differently: near ties between beams could go either way.
    mask = torch.ones_like(ids)
    got = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **fields)
    each = fields.get("num_return_sequences", 1)
    want = one_by_one(
        model,
        NAMES,
        lambda i: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fields)[
            i * each : (i + 1) * each
        ],
    )
    assert got.tolist() == torch.cat(want).tolist()
    assert len({tuple(row.tolist()) for row in got}) > 3  # the adapters do not all say the same


def test_saved_modules_take_part():
    model = with_adapters(llama(), modules_to_save=["lm_head"], exclude_modules=["lm_head"])
    for i, name in enumerate(VARIANT_NAMES):
        model.base_model.model.lm_head.modules_to_save[name.upper()].weight.data.mul_(i + 2)
    ids = torch.randint(0, 50, (len(NAMES), 4))
    with torch.no_grad():
        got = model(ids, adapter_names=NAMES).logits
        want = torch.cat(one_by_one(model, NAMES, lambda i: model(ids[i : i + 1]).logits))
    assert close(got, want)


def test_wrong_names_are_refused_and_leave_nothing_behind():
    model = with_adapters(llama())
    ids = torch.randint(0, 50, (2, 4))
    with torch.no_grad():
        want = model(ids).logits
    with pytest.raises(ConfigError, match=r"no \['BNOE'\] in this model, which has \['BONE', .*'__base__' is"):
        model(ids, adapter_names=["BONE", "BNOE"])
    with pytest.raises(ConfigError, match="got 'BONE', wanted a list with a name for each row"):
        model(ids, adapter_names="BONE")
    with pytest.raises(ShapeError, match="3 names, but a layer gets an input with 2 rows"):
        model(ids, adapter_names=["BONE", "MINI", "BONE"])
    with pytest.raises(ConfigError, match=r"training mode.*call model.eval\(\) first"):
        model.train()(ids, adapter_names=["BONE", "MINI"])
    with torch.no_grad():
        assert same_bits(model.eval()(ids).logits, want, Promise.SAME_PRODUCT)


class Head(nn.Module):
    """Calls its head by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(input=self.body(x))


def test_saved_modules_that_are_called_by_keyword_take_part():
    config = BoneConfig(r=3, target_modules=["body"], modules_to_save=["head"], init_weights=False)
    model = get_peft_model(Head(), config, adapter_name="A")
    model.add_adapter("B", BoneConfig(r=2, target_modules=["body"], modules_to_save=["head"], init_weights=False))
    model.base_model.model.head.modules_to_save["B"].weight.data.mul_(-3)
    model, x, names = model.eval(), torch.randn(3, 6), ["B", "A", "B"]
    with torch.no_grad():
        assert close(model(x, adapter_names=names), torch.cat(one_by_one(model, names, lambda i: model(x[i : i + 1]))))
