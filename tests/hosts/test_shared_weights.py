"""One weight in several places: a merge changes it once, or is refused where it would change what has no adapter."""

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn

from flashbone.errors import ConfigError
from helpers.adapter_folders import tiny_llama
from helpers.comparison import Promise, close, same_bits
from helpers.families import FAMILIES
from helpers.mlp import fill_blocks

TOKENS = torch.arange(10).view(2, 5)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS)[0]


def adapted(base: nn.Module, *targets: str, variant: str = "bone") -> nn.Module:
    model = get_peft_model(base, BoneConfig(r=4, variant=variant, target_modules=list(targets)))
    fill_blocks(model)
    return model


class Twice(nn.Module):
    """The same layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.others = nn.Sequential(nn.Linear(8, 8), self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.others(self.first(x))


@pytest.mark.parametrize("variant", ["bone", "bat-col"])
def test_a_layer_that_is_run_several_times_is_merged_once(variant):
    torch.manual_seed(0)
    model = adapted(FAMILIES["albert"].make(), "query", "ffn", variant=variant)
    calls = []
    model.get_submodule(
        "base_model.model.albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    ).register_forward_hook(lambda *args: calls.append(args))
    want = outputs(model)
    assert len(calls) == 2
    for _ in range(2):
        model.merge_adapter()
        assert close(outputs(model), want)
        model.unmerge_adapter()
        assert close(outputs(model), want)
    assert close(outputs(model.merge_and_unload()), want)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_would_change_the_tied_embeddings_is_refused(merge):
    torch.manual_seed(0)
    model = adapted(tiny_llama(tie_word_embeddings=True), "lm_head", "q_proj")
    want, weight = outputs(model), model.get_input_embeddings().weight.clone()
    with pytest.raises(
        ConfigError, match=r"lm_head is adapted, and model\.embed_tokens\.weight uses the same .* untie"
    ):
        getattr(model, merge)()
    assert same_bits(outputs(model), want, Promise.SAME_PRODUCT)
    assert same_bits(model.get_input_embeddings().weight, weight, Promise.UNTOUCHED)


def test_tied_embeddings_that_have_no_adapter_are_no_obstacle():
    torch.manual_seed(0)
    model = adapted(tiny_llama(tie_word_embeddings=True), "q_proj")
    want = outputs(model)
    merged = model.merge_and_unload()
    assert close(outputs(merged), want)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_untied_copy_is_merged_as_the_error_says():
    torch.manual_seed(0)
    base = tiny_llama(tie_word_embeddings=True)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    model = adapted(base, "lm_head")
    want = outputs(model)
    assert close(outputs(model.merge_and_unload()), want)


def test_a_layer_that_also_stands_elsewhere_without_the_adapter_is_not_merged():
    model = adapted(Twice(), "first")
    with pytest.raises(ConfigError, match=r"first is adapted, and others\.1 uses the same weight without it"):
        model.merge_adapter()
    assert not model.get_submodule("base_model.model.first").merged
