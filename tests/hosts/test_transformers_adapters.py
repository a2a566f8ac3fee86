"""transformers' own add_adapter, load_adapter and from_pretrained: what they do, and that a failure leaves no trace."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import BoneConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from flashbone.errors import ConfigError, FlashboneError, FormatError, ShapeError
from flashbone.ops import moves
from flashbone.tuner.layers.calls import CURRENT
from flashbone.tuner.layers.layer import BoneLayer
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.encoders import write_encoder
from helpers.transformers_peft import needs_transformers_own_adapters

TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
TOKENS = torch.arange(9)[None]
LAYERS = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "o_proj")}

# peft about a second adapter on a model; it is what these tests do
pytestmark = [
    needs_transformers_own_adapters,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


def config(variant: str = "bone", **fields) -> BoneConfig:
    defaults = {"r": 6, "variant": variant, "mini_r": 2, "init_weights": False, "target_modules": ["q_proj", "o_proj"]}
    return BoneConfig(**defaults | fields)


def base(llama) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(llama)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def snapshot(model) -> tuple:
    """All that a failed operation must not change, outputs included."""
    parameters = dict(model.named_parameters())
    return (
        {name: parameter.requires_grad for name, parameter in parameters.items()},
        {name: (type(module), module.training) for name, module in model.named_modules()},
        {n: (m.active_adapters, list(m.bone_block)) for n, m in model.named_modules() if isinstance(m, BoneLayer)},
        (model._hf_peft_config_loaded, list(getattr(model, "peft_config", {}))),
        {name: parameter.detach().numpy().tobytes() for name, parameter in parameters.items()},
        logits(model).numpy().tobytes(),
    )


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_adapters_are_added_switched_disabled_saved_loaded_and_deleted(variant, llama, tmp_path):
    model = base(llama)
    plain = logits(model)
    model.add_adapter(config(variant), "a")
    want = logits(model)
    model.add_adapter(config("bone", r=4), "b")
    assert model.active_adapters() == ["b"]
    assert not torch.allclose(logits(model), want)
    model.set_adapter("a")
    assert model.active_adapters() == ["a"]
    assert same_bits(logits(model), want, Promise.SAME_PRODUCT)
    model.disable_adapters()
    assert same_bits(logits(model), plain, Promise.SAME_PRODUCT)
    model.enable_adapters()
    state = model.get_adapter_state_dict("a")
    assert set(state) == {f"{name}.bone_block" for name in LAYERS}
    model.save_pretrained(tmp_path)

    again = base(llama)
    again.load_adapter(str(tmp_path), "of any name")
    loaded = again.get_adapter_state_dict("of any name")
    assert all(same_bits(loaded[name], block, Promise.STORED) for name, block in state.items())
    assert close(logits(again), want)  # loaded tensors lie in memory as in the file
    assert not any(parameter.requires_grad for name, parameter in again.named_parameters() if "bone_" in name)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), want)  # finds the base by itself
    given = base(llama)
    given.load_adapter(peft_config=config(variant), adapter_state_dict=state)
    assert same_bits(logits(given), want, Promise.SAME_PRODUCT)

    model.delete_adapter("b")
    assert same_bits(logits(model), want, Promise.SAME_PRODUCT)
    model.delete_adapter("a")
    assert not model._hf_peft_config_loaded
    assert same_bits(logits(model), plain, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["typo"]}, "Target modules {'typo'} not found"),
        ({"target_modules": ["q_proj", "rotary_emb"]}, "model.rotary_emb: target module cannot be adapted"),
        ({"bottleneck_size": 64, "r": 64}, "64"),
    ],
)
def test_an_adapter_that_cannot_be_added_leaves_no_trace(second, fields, message, llama):
    model = base(llama)
    if second:
        model.add_adapter(config("bat-col"), "first")
    before = snapshot(model)
    with pytest.raises(FlashboneError, match=message):
        model.add_adapter(config(**fields))
    assert snapshot(model) == before


def drop(tensors):
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.bone_block"]


def resize(tensors):
    for key in tensors:
        tensors[key] = tensors[key][:2].clone()


def rename(tensors):
    tensors["base_model.model.model.layers.7.q_proj.bone_block"] = torch.ones(6, 32)


def saved(llama, folder: Path, change=None) -> str:
    """An adapter folder, its tensors changed, or its file cut short."""
    model = base(llama)
    model.add_adapter(config())
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif change:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return str(folder)


MISFITS = [
    (drop, ShapeError, r"layers.1.self_attn.q_proj: the checkpoint has no block for it"),
    (
        resize,
        ShapeError,
        r"q_proj: bone adapter has a block of shape \(6, 32\) but the checkpoint holds \(2, 32\); was r",
    ),
    (rename, ShapeError, r"layers.7.q_proj.bone_block: the model has no such tensor"),
    ("cut", FormatError, "its weights cannot be read: .* is the file whole"),
]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("change", "kind", "message"), MISFITS)
def test_loading_what_does_not_fit_is_one_clear_line_and_leaves_no_trace(
    second, change, kind, message, llama, tmp_path
):
    folder, model = saved(llama, tmp_path, change), base(llama)
    if second:
        model.add_adapter(config("bat-row", r=4), "first")
    model.train()
    before = snapshot(model)
    with pytest.raises(kind, match=message) as raised:
        model.load_adapter(folder)
    assert "\n" not in str(raised.value)
    assert snapshot(model) == before
    with pytest.raises(kind, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_into_a_name_that_is_taken_changes_nothing(llama, tmp_path):
    folder, model = saved(llama, tmp_path, drop), base(llama)
    model.add_adapter(config("bat-row"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(folder)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(config())
    with pytest.raises(ValueError, match="only supported for LoRA, please set `hotswap=False`"):
        model.load_adapter(folder, "default", hotswap=True)
    assert snapshot(model) == before


def test_mismatched_sizes_are_ignored_where_asked_for(llama, tmp_path):
    folder, model = saved(llama, tmp_path, resize), base(llama)
    info = model.load_adapter(folder, ignore_mismatched_sizes=True)
    assert len(info.mismatched_keys) == len(LAYERS)
    assert model.active_adapters() == ["default"]


def test_saved_modules_travel_with_the_adapter_and_their_lack_is_refused(llama, tmp_path):
    model = base(llama)
    model.add_adapter(config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(2)
    want = logits(model)
    model.save_pretrained(tmp_path)
    again = base(llama)
    again.load_adapter(str(tmp_path))
    assert close(logits(again), want)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "lm_head" not in key}, file)
    again = base(llama)
    before = snapshot(again)
    with pytest.raises(FlashboneError, match="lm_head"):
        again.load_adapter(str(tmp_path))
    assert snapshot(again) == before


@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_a_task_is_trained_and_saved_as_by_get_peft_model(task, tmp_path):
    """A head that the checkpoint lacks is drawn at random whenever it is loaded."""
    folder = write_encoder("distilbert", tmp_path / "base")
    model = TASKS[task].from_pretrained(folder)
    settings = BoneConfig(r=4, target_modules=["q_lin"], task_type=task)
    model.add_adapter(settings)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    same = BoneConfig(r=4, target_modules=["q_lin"], task_type=task)
    other = get_peft_model(TASKS[task].from_pretrained(folder), same)
    wanted = {name.removeprefix("base_model.model.") for name, p in other.named_parameters() if p.requires_grad}
    assert trained == wanted
    assert any("modules_to_save" in name for name in trained)
    for name in trained:
        torch.nn.init.normal_(model.get_parameter(name))
    model.save_pretrained(tmp_path / "adapter")
    again = TASKS[task].from_pretrained(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    tokens = torch.arange(5)[None]
    for output, want in zip(again(tokens).values(), model(tokens).values(), strict=True):
        assert close(output, want)


def test_a_failure_leaves_the_config_and_a_new_pooler_is_named(tmp_path):
    model = TASKS["SEQ_CLS"].from_pretrained(write_encoder("bert", tmp_path / "base"))
    settings = BoneConfig(r=4, target_modules=["typo"], task_type="SEQ_CLS", modules_to_save=["pooler"])
    with pytest.raises(FlashboneError, match="No modules were targeted"):
        model.add_adapter(settings)
    assert settings.modules_to_save == ["pooler"]
    with pytest.warns(UserWarning, match=r"modules_to_save=\['bert.pooler.dense'\]"):
        model.add_adapter(BoneConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))


def test_other_methods_do_what_they_did_without_flashbone(llama, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = base(llama)
    model.add_adapter(lora)
    model.save_pretrained(tmp_path)
    again = base(llama)
    again.load_adapter(str(tmp_path))
    assert close(logits(again), logits(model))
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: torch.cat([tensor, tensor]) for key, tensor in load_file(file).items()}, file)
    again = base(llama)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as raised:
        again.load_adapter(str(tmp_path))
    assert not isinstance(raised.value, FlashboneError)
    assert again._hf_peft_config_loaded  # as transformers leaves it
    with pytest.raises(ValueError, match="not found") as raised:
        base(llama).add_adapter(LoraConfig(target_modules=["typo"]))
    assert not isinstance(raised.value, ConfigError)


def test_generation_is_one_call_for_which_layers_keep_their_weights_and_switches_wait(llama, monkeypatch):
    model, built, original = base(llama).eval(), [], moves.shifted_weight
    plain = model.generate(TOKENS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    model.add_adapter(config("bat-col"), "a")
    model.add_adapter(config("bone"), "b")
    model.set_adapter("a")
    model.eval()
    monkeypatch.setattr(moves, "shifted_weight", lambda *a: built.append(1) or original(*a))
    fields = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    in_process = {"attention_mask": torch.ones_like(TOKENS), **fields}
    for _ in range(2):
        built.clear()
        model.generate(TOKENS, **in_process)
        assert len(built) == len(LAYERS)
        assert CURRENT.gate is CURRENT.kept is None
    order, inside = [], threading.Event()

    def stay(ids, scores):
        inside.set()
        time.sleep(0.01)
        order.append("token")
        return scores

    caller = threading.Thread(target=lambda: model.generate(TOKENS, logits_processor=[stay], **in_process))
    caller.start()
    assert inside.wait(20)
    model.set_adapter("b")
    assert order == ["token"] * 8
    caller.join(20)
    model.disable_adapters()
    assert model.generate(TOKENS, **in_process).tolist() == plain.tolist()


@pytest.mark.slow
def test_the_first_load_is_guarded_even_before_anything_has_imported_peft(llama, tmp_path):
    code = f"""
import sys, flashbone
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(llama)!r})
assert "peft" not in sys.modules
try:
    model.load_adapter({saved(llama, tmp_path, drop)!r})
except flashbone.FlashboneError as error:
    assert "has no block for it" in str(error) and not model._hf_peft_config_loaded
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr
