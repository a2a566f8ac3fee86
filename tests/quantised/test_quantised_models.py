"""Whole models that transformers loads quantised: training, checkpoints, saving, merging, targets."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from peft import BoneConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from flashbone.tuner.layers.layer import BoneLinear
from helpers import quantised
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, same_bits

pytestmark = [
    pytest.mark.beside,
    # transformers 5.23, in peft's prepare_model_for_kbit_training
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CONFIGS = {
    "bnb nf4": lambda: BitsAndBytesConfig(**NF4),
    "bnb int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(quantised._int8_weights()),
    "torchao int4": lambda: TorchAoConfig(quantised._int4_weights()),
    "torchao int8 activations": lambda: TorchAoConfig(quantised._int8_activations()),
}
RXN = importlib.util.find_spec("rxnmapper")
IDS = torch.arange(24).view(2, 12) % 30


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=30, max_position_embeddings=32, initializer_range=0.2, **sizes, **heads)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(llama_folder):
    def load(backend: str | None, **kwargs) -> nn.Module:
        chosen = {} if backend is None else {"quantization_config": CONFIGS[backend]()}
        return AutoModelForCausalLM.from_pretrained(llama_folder, **chosen, **kwargs)

    return load


def bone(variant: str, **fields) -> BoneConfig:
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
    return BoneConfig(r=16, variant=variant, **fields)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def trained(model: nn.Module, variant: str, steps: int = 2, **fields) -> nn.Module:
    """The model with an adapter that has taken a few steps, in eval mode."""
    torch.manual_seed(0)
    model = get_peft_model(model, bone(variant, **fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        loss_of(model.train()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def albert(config=None) -> nn.Module:
    assert RXN is not None
    root = Path(RXN.submodule_search_locations[0]) / "models/transformers/albert_heads_8_uspto_all_1310k"
    return AutoModelForMaskedLM.from_pretrained(root, **({} if config is None else {"quantization_config": config}))


def losses(model: nn.Module, batches: list[torch.Tensor], variant: str | None = None) -> torch.Tensor:
    """The frozen model's losses on the batches; with a variant, those of as many steps of training on the first."""
    if variant is None:
        with torch.no_grad():
            return torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches])
    targets = ["attention.query", "attention.value", "intermediate", "mlp.down"]
    model = get_peft_model(model, BoneConfig(r=16, variant=variant, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, weight_decay=0)
    found = []
    for _ in batches:
        loss = model(input_ids=batches[0], labels=batches[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.fixture(scope="module")
def plain_losses():
    batches = list(torch.randint(5, 591, (4, 2, 24), generator=torch.Generator().manual_seed(0)))
    return batches, {variant: losses(albert(), batches, variant) for variant in (None, *VARIANT_NAMES)}


@pytest.mark.skipif(RXN is None, reason="rxnmapper, which ships a small pretrained ALBERT, is not installed")
@pytest.mark.parametrize("backend", ["bnb nf4", "bnb int8", "torchao int8"])
def test_four_steps_of_training_follow_the_fp32_run_to_within_quantisation_noise(backend, plain_losses):
    batches, plain = plain_losses
    config = CONFIGS[backend]
    noise = (losses(albert(config()), batches) - plain[None]).square().mean().sqrt()
    assert 0 < noise < 0.3
    for variant in VARIANT_NAMES:
        got, want = losses(albert(config()), batches, variant), plain[variant]
        assert (got - want).abs().max() < 3 * noise, (variant, got, want)
        assert want[-1] < want[0]
        learned, wanted = got[0] - got[-1], want[0] - want[-1]
        # mini learns 0.09 in four steps; two losses' noise is as much where a CPU's int8 products round more.
        allowed = max(wanted * (0.7 if "nf4" in backend else 0.25), 2 * noise)
        assert learned > 0, (variant, got, want)
        assert abs(learned - wanted) < allowed, (variant, got, want)


@pytest.mark.parametrize("backend", CONFIGS)
def test_an_adapter_is_saved_loaded_and_merged_on_the_quantised_model(backend, load, tmp_path):
    model = trained(load(backend), "bat-col")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(IDS).logits
        loaded = PeftModel.from_pretrained(load(backend), tmp_path).eval()
        assert same_bits(loaded(IDS).logits, want, Promise.SAME_PRODUCT)
        with loaded.disable_adapter():
            base = loaded(IDS).logits
        assert not torch.equal(base, want)
        loaded.merge_adapter()
        merged = loaded(IDS).logits
        assert not torch.equal(merged, base)
        if "int8" in backend:  # of so small a difference 4 bits show little
            assert (merged - want).norm() < 0.6 * (base - want).norm()
        loaded.unmerge_adapter()
        assert same_bits(loaded(IDS).logits, want, Promise.SAME_PRODUCT)
        unloaded = loaded.merge_and_unload(safe_merge=True)
        assert not any(isinstance(module, BoneLinear) for module in unloaded.modules())
        assert same_bits(unloaded(IDS).logits, merged, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("backend", CONFIGS)
@pytest.mark.parametrize("variant", ["bone", "bat-col", "orthogonal"])
def test_gradient_checkpointing_after_preparing_for_training_gives_equal_gradients(backend, variant, load):
    grads = []
    for use in (False, True):
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if use else {}
        model = prepare_model_for_kbit_training(load(backend), use_gradient_checkpointing=use, **kwargs)
        torch.manual_seed(0)
        model = get_peft_model(model, bone(variant, init_weights=False)).train()
        for parameter in model.parameters():
            parameter.data = parameter.data / 5 if parameter.requires_grad else parameter.data
        loss_of(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 14
    assert grads[0].keys() == grads[1].keys()
    assert all(
        same_bits(grads[0][name], grads[1][name], Promise.SAME_PRODUCT) and grads[0][name].abs().max() > 0
        for name in grads[0]
    )


@pytest.mark.parametrize("backend", ["bnb nf4", "bnb int8", "torchao int8"])
def test_a_bf16_model_keeps_its_adapters_in_fp32(backend, load):
    model = trained(load(backend, dtype=torch.bfloat16), "bat-row")
    assert {p.dtype for name, p in model.named_parameters() if "bone_" in name} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16
    assert loss_of(model) < loss_of(load(backend, dtype=torch.bfloat16).train())


def test_transformers_own_add_adapter_and_its_trainer_train_a_quantised_model(load, tmp_path):
    model = load("bnb nf4")
    model.add_adapter(bone("bat-col"))
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = transformers.TrainingArguments(tmp_path, max_steps=3, learning_rate=3e-3, **quiet)
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    before = loss_of(model).item()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert loss_of(model.train()).item() < before - 0.1


def test_roles_and_all_linear_name_the_same_layers_as_in_the_plain_model(load):
    def targets(model, target_modules):
        adapted = get_peft_model(model, bone("bone", target_modules=target_modules))
        return [name for name, module in adapted.named_modules() if isinstance(module, BoneLinear)]

    for asked in ("all-linear", ["attention.query", "mlp.down"], ["mlp"]):
        want = targets(load(None), asked)
        assert want
        assert targets(load("bnb nf4"), asked) == want
        assert targets(with_hqq(load(None)), asked) == want


def with_hqq(model: nn.Module) -> nn.Module:
    """The model with its layers in HQQ, which transformers 5.23 cannot load: they are no `torch.nn.Linear`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised._hqq(module, 8).layer)
    return model.requires_grad_(False)


def test_a_model_of_hqq_layers_trains_and_merges(load):
    model = with_hqq(load(None))
    before = loss_of(model).item()
    model = trained(model, "bat-col", steps=3)
    want = loss_of(model).item()
    assert want < before - 0.1
    model.merge_adapter()
    assert abs(loss_of(model).item() - want) < 0.5 * (before - want)
    model.unmerge_adapter()
    assert loss_of(model).item() == want
