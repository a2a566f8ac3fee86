"""Sizes matched to a budget: counts are those of real models, budgets are met, and what cannot meet one says so."""

import re

import pytest
import torch
from small_models import LINEARS, albert, bert, gpt2, ids, llama, minilm, real

from flashbone.compare.attaching import attach
from flashbone.compare.methods import METHODS, TrainingMethod, bone_method
from flashbone.compare.size_lists import ranks
from flashbone.compare.sizes import Budget, MethodSize, ParameterCounter, budget_of, match
from flashbone.errors import ConfigError
from flashbone.tuner.model.skeleton import skeleton
from flashbone.variants import VARIANTS
from helpers.rwkv import write_rwkv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # of SHiRA's
]

TARGETS = {"llama": LINEARS, "bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"], "albert": ["query", "value"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
SOURCES = {"llama": llama, "bert": bert, "gpt2": gpt2, "albert": albert, "minilm": minilm}
NO_CONV1D = {"oft", "boft", "hra", "miss", "olora", "lily", "shira", "c3a"}  # PEFT has no such layers of theirs
MATCHED = [name for name, method in METHODS.items() if method.sizes]
IA3 = {"ia3": {"feedforward_modules": []}}  # ALBERT is not in PEFT's table


def setting(case):
    task_type = TASKS.get(case, "SEQ_CLS")
    source = SOURCES[case]()
    return source, TARGETS.get(case, ["query", "value"]), task_type


def counter(source, targets, task_type):
    return ParameterCounter(skeleton(source, task_type=task_type), targets, task_type)


def matched(name, case, budget, **settings):
    source, targets, task_type = setting(case)
    settings = {**IA3.get(name, {}), **settings}
    found = match(METHODS[name], settings, budget, counter(source, targets, task_type))
    return found, source, targets, task_type, settings


def counted(name, found, source, targets, task_type, settings):
    """What really trains, of the model with weights: the adapter, all, all that there is."""
    method, model = METHODS[name], real(source, task_type)
    base = sum(p.numel() for p in model.parameters())
    model = attach(model, method, method.config(found.settings, targets, task_type, settings), 0)
    trained = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    adapter = sum(n for key, n in trained.items() if "modules_to_save" not in key and "classifier" not in key)
    total = sum(p.numel() for p in model.parameters()) if method.is_bound else base + adapter
    model.eval()(ids())
    return adapter, sum(trained.values()), total


@pytest.mark.parametrize(
    ("case", "budget"), [("llama", 1500), ("llama", 4321), ("bert", 700), ("gpt2", 1100), ("albert", 9000)]
)
@pytest.mark.parametrize("name", METHODS)
def test_counts_are_those_of_the_real_model(name, case, budget):
    if case == "gpt2" and name in NO_CONV1D:
        with pytest.raises(ConfigError, match=f"{name}: .*Conv1D"):
            matched(name, case, budget)
        return
    found, *rest = matched(name, case, budget)
    want = counted(name, found, *rest)
    assert (found.adapter_parameters, found.trainable_parameters, found.total_parameters) == want
    if not METHODS[name].is_bound:
        assert found.off_budget == pytest.approx(found.adapter_parameters / budget - 1)
        assert found.matched == (abs(found.off_budget) <= 0.03)


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_those_of_a_real_minilm(name):
    found, *rest = matched(name, "minilm", 147456)
    assert (found.adapter_parameters, found.trainable_parameters, found.total_parameters) == counted(name, found, *rest)


@pytest.mark.parametrize("budget", [1600, 2345, 3456, 4321])
@pytest.mark.parametrize(
    "name", ["bone", "bat-row", "bat-col", "mini", "orthogonal", "lora", "rslora", "dora", "pissa", "olora"]
)
def test_methods_with_sizes_of_single_layers_meet_every_budget(name, budget):
    found, *_ = matched(name, "llama", budget)
    assert found.matched, found
    assert not found.fixed


@pytest.mark.slow
def test_methods_of_smollm2_s_shape_lie_close_together_or_say_that_they_do_not():
    source = llama(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    for r in (8, 16, 50):
        budget = r * 2 * (576 * 3 + 192 * 2 + 1536 * 2)
        sizes = [match(METHODS[name], {}, budget, counter(source, "all-linear", "CAUSAL_LM")) for name in MATCHED]
        assert all(found.matched == (abs(found.off_budget) <= 0.03) for found in sizes)
        patterned = [found for name, found in zip(MATCHED, sizes, strict=True) if METHODS[name].has_patterns]
        offs = [found.off_budget for found in patterned]
        assert max(offs) - min(offs) <= 0.03, patterned
        assert len(patterned) == 11


def test_what_meets_no_budget_says_so_and_comes_as_near_as_it_can():
    for name, budget, size in [
        ("oft", 2250, "oft_block_size = 12"),
        ("vera", 5000, "r = 256"),
        ("hra", 1000, "r = 8"),
        ("ia3", 4000, "no size"),
    ]:
        found, *_ = matched(name, "llama", budget)
        assert (found.matched, found.size) == (False, size), found
        assert abs(found.off_budget) > 0.03
    assert found.fixed


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("name", ["bone", "bat-row", "bat-col", "mini", "orthogonal", "lora", "dora", "pissa", "olora"])
def test_a_pattern_of_sizes_takes_effect_in_the_layers_that_it_names(name, layers):
    method, source = METHODS[name], llama(num_hidden_layers=layers)
    budget = {"mini": 350, "orthogonal": 594}.get(name, 900) * layers
    found = match(method, {}, budget, counter(source, LINEARS, "CAUSAL_LM"))
    assert found.matched
    low, patterns = found.settings["r"], found.settings["rank_pattern"]
    (high,) = set(patterns.values())
    model = attach(real(source), method, method.config(found.settings, LINEARS, "CAUSAL_LM", {}), 0)
    sizes, scales = {}, set()
    for key, module in model.base_model.model.named_modules():
        for attribute in ("bone_r", "r"):
            if "default" in (getattr(module, attribute, None) or {}):
                sizes[key] = getattr(module, attribute)["default"]
                scales.add(getattr(module, "scaling", {}).get("default"))
    inside = {key for key, size in sizes.items() if size == high}
    assert inside == {key for key in sizes if any(re.fullmatch(pattern, key) for pattern in patterns)}
    assert 0 < len(inside) < len(sizes) == 7 * layers
    assert {size for key, size in sizes.items() if key not in inside} == {low}
    assert len(scales) == 1  # alpha follows the rank
    assert found.size.startswith(f"r = {low} or {high}")


def test_single_modules_are_mixed_where_layers_are_too_coarse():
    found, *rest = matched("lora", "bert", 432 * 2 + 70)  # r = 3 takes 864 in four modules, r = 4 1152
    assert found.matched
    assert all("layer\\.0" in key or "layer\\.1" in key for key in found.settings["rank_pattern"])
    assert counted("lora", found, *rest)[0] == found.adapter_parameters


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("lora", {"r": 5}, "r = 5"),
        ("bone", {"r": 5, "rank_pattern": {"q_proj": 3}}, "r = 3 or 5"),
        ("orthogonal", {"bottleneck_size": 9}, "r = 9"),
        ("mini", {"r": 4, "mini_r": 6}, "r = 4, mini_r = 6"),
        ("oft", {"oft_block_size": 4}, "oft_block_size = 4"),
        ("oft", {"r": 6, "oft_block_size": 0}, "r = 6"),
        ("boft", {"boft_block_num": 4, "boft_block_size": 0}, "boft_block_num = 4"),
        ("vera", {"r": 100}, "r = 100"),
    ],
)
def test_a_size_that_the_user_gives_is_kept(name, settings, size):
    found, *rest = matched(name, "llama", 2000, **settings)
    assert (found.size, found.fixed, found.settings) == (size, True, {})
    assert found.adapter_parameters == counted(name, found, *rest)[0]
    assert found.off_budget == pytest.approx(found.adapter_parameters / 2000 - 1)


@pytest.mark.parametrize(("given", "other"), [({"r": 30}, "mini_r"), ({"mini_r": 9}, "r")])
def test_of_mini_s_two_sizes_the_one_that_is_left_is_matched(given, other):
    found, *rest = matched("mini", "llama", 1700, **given)
    assert found.matched
    assert not found.fixed
    assert found.settings[other] != 1
    assert counted("mini", found, *rest)[0] == found.adapter_parameters


def test_settings_that_add_parameters_are_counted_before_the_size_is_chosen():
    found, *rest = matched("lora", "bert", 1600, lora_bias=True)
    plain, *_ = matched("lora", "bert", 1600)
    assert found.matched
    assert found.settings != plain.settings
    assert counted("lora", found, *rest)[0] == found.adapter_parameters


def test_rank_three_of_pissa_is_not_more_than_a_layer_has():
    found, *_ = matched("pissa", "llama", 10**6)
    assert (found.size, found.matched) == ("r = 12", False)  # k_proj has 12 outputs


@pytest.mark.parametrize("version", [6, 7])
def test_a_pth_of_rwkv_is_matched_by_the_real_model(version, tmp_path):
    from flashbone.rwkv import from_pth

    file = write_rwkv(tmp_path / "model.pth", version, 32, 8, 2)
    targets = ["att.receptance", "att.key", "ffn.key", "ffn.value"]
    for name in ("bone", "lora", "hra", "linear"):
        found = match(
            METHODS[name], {}, 3000, ParameterCounter(from_pth(file, dtype=torch.float32), targets, "CAUSAL_LM")
        )
        model, method = from_pth(file, dtype=torch.float32), METHODS[name]
        config = method.config(found.settings, targets, "CAUSAL_LM", {})
        trained = sum(p.numel() for p in attach(model, method, config, 0).parameters() if p.requires_grad)
        assert found.adapter_parameters == trained
        assert found.matched == (name in ("bone", "lora"))


def test_the_model_stays_as_it_is():
    model = real(llama(tie_word_embeddings=True))
    found = match(METHODS["lora"], {}, 3000, ParameterCounter(model, LINEARS, "CAUSAL_LM"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.device.type == "cpu"
    assert found.total_parameters == sum(p.numel() for p in model.parameters()) + found.adapter_parameters


def test_budgets_come_from_a_method_or_a_number():
    def budget(spec):
        return budget_of(spec, counter(llama(), LINEARS, "CAUSAL_LM"))

    outputs = 2 * (36 + 12 + 12 + 36 + 60 + 60 + 36)
    assert budget({"method": "bone", "r": 6}) == Budget(6 * outputs, "bone, r = 6")
    assert budget(1234) == Budget(1234, "")
    for spec, message in [
        ({"method": "bone"}, "budget: bone: its size is missing; set r"),
        ({"method": "bone", "r": 0}, "budget: bone: BoneConfig: `r` should be"),
        ({"method": "full"}, "budget: full is a bound"),
        ({"method": "bonne", "r": 2}, "budget: method: got 'bonne'"),
        ({"r": 2}, "budget: got {'r': 2}, wanted a number of parameters, or a method"),
        (0, "budget: got 0, wanted a positive number"),
        (True, "budget: got True, wanted a number"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            budget(spec)


def test_a_sized_method_is_a_plain_value():
    found, *_ = matched("bone", "llama", 6 * 504)
    assert found == MethodSize("r = 6", {"r": 6}, 3024, 3024, found.total_parameters, 0.0, True, False)


def test_wrong_settings_are_told_before_anything_is_matched():
    with pytest.raises(ConfigError, match=r"oft: unknown field: oft_blocksize \(did you mean oft_block_size"):
        matched("oft", "llama", 2000, oft_blocksize=4)


def test_a_method_is_one_entry_and_a_variant_of_bone_none(monkeypatch):
    class Sixth(VARIANTS["bone"]):
        name = "sixth"

    monkeypatch.setitem(VARIANTS, "sixth", Sixth)
    monkeypatch.setitem(METHODS, "sixth", bone_method(Sixth()))
    loha = TrainingMethod("loha", "LoHa", "LoHaConfig", size_fields=("r",), sizes=ranks)
    monkeypatch.setitem(METHODS, "loha", loha)
    for name, size in {"sixth": "r = 8", "loha": "r = 2"}.items():
        found, *rest = matched(name, "llama", 4032)
        assert (found.size, found.adapter_parameters) == (size, counted(name, found, *rest)[0])
