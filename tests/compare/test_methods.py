"""The methods of a comparison on small models: what they attach, where they start, what trains, what is refused."""

import copy
import os

import peft
import pytest
import torch
from small_models import LINEARS, NAMES, albert, bert, gpt2, ids, llama, real
from torch import nn

from flashbone.compare.attaching import adapter_bytes, attach, save_adapter
from flashbone.compare.methods import METHODS, get_method
from flashbone.errors import ConfigError
from flashbone.train.adapters import same_compilers
from helpers.comparison import Promise, close, same_bits

# torch says the second once in a process, when SHiRA first makes a sparse tensor
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sparse invariant checks")]

ADAPTERS = [name for name, method in METHODS.items() if not method.is_bound]
# A size each, which fits inputs of 36 and 60.
SIZES = {name: {"r": 2} if "r" in METHODS[name].size_fields else {} for name in ADAPTERS}
SIZES |= {"oft": {"oft_block_size": 6}, "boft": {"boft_block_size": 6}, "c3a": {"block_size": 6}}
CASES = {"llama": (llama, "CAUSAL_LM", LINEARS), "bert": (bert, "SEQ_CLS", ["query", "value", "output.dense"])}


def attached(name, seed=0, case="llama", **settings):
    config, task_type, targets = CASES[case]
    method = METHODS[name]
    made = method.config(SIZES.get(name, {}), targets, task_type, settings)
    return attach(real(config(), task_type), method, made, seed)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_start_changes_no_output(name, case):
    config, task_type, _ = CASES[case]
    want = real(config(), task_type)(ids()).logits
    got = attached(name, case=case).eval()(ids()).logits
    # PiSSA and OLoRA take W apart and put it together, OFT and HRA multiply by the identity, all up to rounding.
    assert close(got, want)
    if METHODS[name].config_class in ("BoneConfig", "MissConfig") or name in ("lora", "rslora", "vera", "full"):
        assert name == "orthogonal" or same_bits(got, want, Promise.EXACT)  # zeros are added


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_makes_the_same_model_bit_for_bit(name):
    first, second = attached(name, 3).state_dict(), attached(name, 3).state_dict()
    assert first.keys() == second.keys()
    assert all(same_bits(second[key], value, Promise.SAME_PRODUCT) for key, value in first.items())


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "hra", "vera"])
def test_another_seed_makes_another_start(name):
    first, second = attached(name, 3).state_dict(), attached(name, 4).state_dict()
    assert any(not torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_what_trains_and_nothing_else(name, case):
    model = attached(name, case=case).train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(2):  # LoRA's A has no gradient in the first
        optimizer.zero_grad()
        labels = ids() if case == "llama" else torch.tensor([0, 2])
        model(ids(), labels=labels).loss.backward()
        optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == set(trained(model))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_peft_type_and_the_fields_of_a_method_are_its_own(name):
    model = attached(name)
    config = model.peft_config["default"]
    assert config.peft_type == METHODS[name].peft_type
    fields = {**METHODS[name].identity, **METHODS[name].defaults}  # PiSSA's name, with its number of iterations
    assert all(getattr(config, key) == value for key, value in fields.items())


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_adapters_load_again_and_their_size_is_that_of_their_files(name, tmp_path):
    model = attached(name, case="bert")
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.01 * torch.randn_like(p))
    size = save_adapter(model, tmp_path)
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert size == files["adapter_model.safetensors"] + files["adapter_config.json"]
    assert size > adapter_bytes(model)  # the header, the configuration, and VeRA's random matrices
    base = real(bert(), "SEQ_CLS")
    if name in ("pissa", "olora"):  # their file belongs to what is left of W, which a fresh base is not
        return
    with same_compilers():
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert same_bits(loaded(ids()).logits, model.eval()(ids()).logits, Promise.SAME_PRODUCT)


def test_full_fine_tuning_takes_half_precision_to_fp32():
    model = attach(real(llama()).bfloat16(), METHODS["full"], None, 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert adapter_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


def test_a_linear_head_in_half_precision_trains_in_fp32():
    model = attach(real(bert(), "SEQ_CLS").bfloat16(), METHODS["linear"], None, 0)
    assert {name: p.dtype for name, p in trained(model).items()} == {
        "classifier.weight": torch.float32,
        "classifier.bias": torch.float32,
    }
    model(ids(), labels=torch.tensor([0, 1])).loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert adapter_bytes(model) == 4 * (3 * 36 + 3)


@pytest.mark.parametrize("config", [llama(tie_word_embeddings=True), gpt2()], ids=["llama", "gpt2"])
def test_a_tied_output_projection_is_trained_as_a_copy(config):
    model = attach(real(config), METHODS["linear"], None, 0)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert list(trained(model)) == ["lm_head.weight"]
    assert same_bits(head, embeddings, Promise.STORED)
    assert head.data_ptr() != embeddings.data_ptr()
    assert not embeddings.requires_grad
    model.tie_weights()  # saving and loading do that
    assert model.get_output_embeddings().weight is head


def test_lora_s_scale_follows_its_conventions():
    def of(name, **settings):
        size = {"r": 6, "rank_pattern": {"q_proj": 12}}
        config = METHODS[name].config(size, LINEARS, "CAUSAL_LM", settings)
        return config.lora_alpha, config.alpha_pattern

    assert of("lora") == of("dora") == (12, {"q_proj": 24})
    assert of("pissa") == of("olora") == (6, {"q_proj": 12})
    assert of("rslora") == (16, {})
    assert of("lora", lora_alpha=5) == (5, {})


@pytest.mark.parametrize(
    ("name", "settings", "messages"),
    [
        (
            "lora",
            {"lora_aplha": 3, "rang": 2},
            ["lora: unknown fields: lora_aplha (did you mean lora_alpha", "rang"],
        ),
        (
            "bone",
            {"varient": "mini", "task_type": "X"},
            ["bone: unknown fields: varient (did you mean variant", "task_type (the comparison decides it)"],
        ),
        ("bone", {"variant": "mini"}, ["bone: variant='mini' makes it another method, wanted 'bone'"]),
        ("bone", {"init_weights": "bat"}, ["bone: variant='bat-col' makes it another method, wanted 'bone'"]),
        ("bone", {"r": -1}, ["bone: BoneConfig: `r` should be a positive integer"]),
        ("lora", {"use_dora": True}, ["lora: use_dora=True makes it another method, wanted False"]),
        (
            "pissa",
            {"init_lora_weights": True},
            ["pissa: init_lora_weights=True makes it another method, wanted 'pissa'"],
        ),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, ["lora: init_lora_weights='pissa' is the method pissa; list"]),
        ("dora", {"init_lora_weights": "olora"}, ["dora: init_lora_weights='olora' is the method olora; list that"]),
        (
            "olora",
            {"init_lora_weights": "pissa"},
            ["olora: init_lora_weights='pissa' makes it another method, wanted 'olora'"],
        ),
        ("boft", {"boft_n_butterfly_factor": 2}, ["boft: boft_n_butterfly_factor=2 makes it another method, wanted 1"]),
        ("oft", {"r": 4, "oft_block_size": 4}, ["oft: You can only specify either r (4) or oft_block_size (4)"]),
        ("full", {"r": 4}, ["full: it has no settings, but got r"]),
    ],
)
def test_wrong_settings_are_named_all_at_once(name, settings, messages):
    with pytest.raises(ConfigError) as error:
        METHODS[name].config({}, LINEARS, "CAUSAL_LM", settings)
    assert "\n" not in str(error.value)
    assert all(message in str(error.value) for message in messages), str(error.value)


def test_pissa_takes_16_iterations_unless_a_setting_has_another_number():
    starts = ({}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"})
    configs = [METHODS["pissa"].config({}, LINEARS, "CAUSAL_LM", settings) for settings in starts]
    assert [config.init_lora_weights for config in configs] == ["pissa_niter_16", "pissa", "pissa_niter_4"]


@pytest.mark.parametrize(
    ("name", "size", "source", "targets", "message"),
    [
        ("oft", {"oft_block_size": 7}, llama, LINEARS, "oft: Invalid `oft_block_size` (7); choose one that divides"),
        ("oft", {"r": 5, "oft_block_size": 0}, llama, LINEARS, "oft: Invalid `r` (5); choose one that divides"),
        (
            "boft",
            {"boft_block_size": 7},
            llama,
            LINEARS,
            "boft: in_features (36) must be divisible by boft_block_size (7)!",
        ),
        ("pissa", {"r": 13}, llama, LINEARS, "pissa: r=13, but model.layers.0.self_attn.k_proj has only 12 directions"),
        ("orthogonal", {"r": 37}, llama, LINEARS, "orthogonal: "),
        ("miss", {"r": 37}, llama, LINEARS, "miss: `r` (37) must be less than or equal to in_features (36)"),
        ("hra", {"r": 2}, gpt2, ["c_attn"], "hra: Target module Conv1D"),
        ("lora", {"r": 2}, llama, ["kproj"], "lora: "),
        ("ia3", {}, albert, ["query"], "ia3: Please specify `feedforward_modules` in `peft_config`"),
    ],
)
def test_what_cannot_be_attached_is_told_in_one_line(name, size, source, targets, message):
    method, made = METHODS[name], source()
    model = real(made, "SEQ_CLS" if source is albert else "CAUSAL_LM")
    with pytest.raises(ConfigError) as error:
        attach(model, method, method.config(size, targets, None, {}), 0)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_boft_leaves_the_compilers_alone():
    before = dict(os.environ)
    attached("boft")
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["pissa", "olora", "hra", "full"])
def test_a_quantised_base_is_refused_where_its_weights_are_needed(name):
    model = copy.copy(real(llama()))
    model.is_quantized = True
    with pytest.raises(ConfigError, match=f"{name}: .*quanti[sz]"):
        attach(model, METHODS[name], METHODS[name].config(SIZES.get(name, {}), LINEARS, "CAUSAL_LM", {}), 0)


def test_a_model_without_a_head_has_no_linear_probe():
    with pytest.raises(ConfigError, match=r"linear: Linear has no head"):
        attach(nn.Linear(2, 2), METHODS["linear"], None, 0)


def test_an_unknown_method_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="method: got 'loro', wanted one of bone, mini"):
        get_method("loro")
