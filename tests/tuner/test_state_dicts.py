"""State dicts of adapters where names differ: tied weights, wrapped bases, renamed modules, odd adapter names."""

import json

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from flashbone import BoneLinear
from flashbone.errors import ConfigError, FormatError, ShapeError
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP, fill_blocks

IDS = torch.tensor([[3, 5, 7, 9]])
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **SMALL, **fields))


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=40, **SMALL))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=40, **sizes, **heads))


def tied_llama() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def logits(model) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


@pytest.mark.parametrize("make", [tied_llama, bert, t5, bart, gpt2])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_file_with_tied_embeddings_loads_on_a_base_that_was_resized_too(make, bias, tmp_path):
    base = make()
    base.resize_token_embeddings(44, mean_resizing=False)
    model = get_peft_model(base, BoneConfig(r=4, target_modules="all-linear", bias=bias, init_weights=False))
    fill_blocks(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = make()
    other.resize_token_embeddings(44, mean_resizing=False)
    other.get_input_embeddings().weight.data.zero_()
    again = PeftModel.from_pretrained(other, tmp_path)
    assert close(logits(again), logits(model))


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_an_adapter_of_a_compiled_base_is_saved_plainly_and_loads_both_ways(saved, tmp_path, request):
    torch.compiler.set_stance("force_eager")  # the tests' shape checks do not compile
    request.addfinalizer(lambda: torch.compiler.set_stance("default"))
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": saved, "init_weights": False}
    model = get_peft_model(torch.compile(llama(), backend="eager"), BoneConfig(**fields))
    fill_blocks(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for base in (llama(), torch.compile(llama(), backend="eager")):
        assert close(logits(PeftModel.from_pretrained(base, tmp_path)), want)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize(
    "old", ["base_model.model._orig_mod.", "_orig_mod.base_model.model.", "module.base_model.model."]
)
def test_files_with_the_names_of_wrappers_load(old, adapter, saved, tmp_path):
    config = BoneConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, init_weights=False)
    model = get_peft_model(llama(), config)
    fill_blocks(model)
    if saved:
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(-2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("base_model.model.", old, 1): t for key, t in load_file(file).items()}, file)
    assert close(logits(PeftModel.from_pretrained(llama(), tmp_path, adapter_name=adapter)), logits(model))


@pytest.mark.parametrize("name", ["bias_of_mine", "bone_block", "value"])
def test_an_adapter_may_have_any_name_that_peft_allows(name, tmp_path):
    config = BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["lin1"], bias="all", init_weights=False)
    model = get_peft_model(MLP((6, 5, 4)), config, adapter_name=name)
    fill_blocks(model)
    model.base_model.model.lin1.modules_to_save[name].weight.data.mul_(-2)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 6, dtype=torch.float64)
    for other in (name, "second"):
        again = PeftModel.from_pretrained(MLP((6, 5, 4)), tmp_path / name, adapter_name=other)
        assert close(again(x), model(x))


@pytest.mark.parametrize("name", ["a.b", ".", "v1.0"])
def test_a_name_with_a_dot_is_refused_in_one_line(name):
    model = MLP((6, 5, 4))
    with pytest.raises(ConfigError, match=r"adapter name: got .*, wanted one that is not empty and has no dot"):
        get_peft_model(model, BoneConfig(r=4, target_modules=["lin0"]), adapter_name=name)
    assert type(model.lin0) is nn.Linear


def test_an_adapter_that_is_named_twice_counts_once():
    model = get_peft_model(MLP((6, 5, 4)), BoneConfig(r=4, target_modules=["lin0"], init_weights=False)).eval()
    fill_blocks(model)
    x = torch.randn(2, 6, dtype=torch.float64)
    want = model(x)
    model.base_model.set_adapter(["default", "default"])
    assert model.active_adapters == ["default"]
    assert close(model(x), want)
    layer = model.base_model.model.lin0
    layer.set_adapter(["default", "default"])
    assert close(model(x), want)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("variant", ["bat-col", "bone", "orthogonal"])
def test_a_mixed_batch_with_an_empty_sequence_axis_is_empty(variant, grad):
    layer = BoneLinear(nn.Linear(6, 5), "x", 3, False, variant=variant).eval()
    with torch.set_grad_enabled(grad):
        for names in (["x", "__base__"], ["__base__", "x"], ["x", "x"]):
            assert layer(torch.randn(2, 0, 6), adapter_names=names).shape == (2, 0, 5)


def test_a_module_to_save_that_the_model_lacks_is_named():
    config = BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["lin_1", "classifier"])
    with pytest.warns(UserWarning, match="modules_to_save: this model has no 'lin_1'; did you mean 'lin1'"):
        get_peft_model(MLP((6, 5, 4)), config)


def test_hot_swap_refuses_a_config_that_contradicts_its_blocks_and_a_broken_file(tmp_path):
    model = get_peft_model(MLP((6, 5, 4)), BoneConfig(r=4, target_modules=["lin0"], init_weights=False))
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"r": 8}))
    with pytest.raises(ShapeError, match="lin0 has r=4, not 8"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert model.peft_config["default"].r == 4
    config.write_text(json.dumps(fields))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FormatError, match=r"its weights cannot be read.*is the file whole"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")


def test_trained_tokens_beside_an_adapter_are_saved_loaded_and_merged(tmp_path):
    config = BoneConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7]}, init_weights=False
    )
    model = get_peft_model(llama(), config)
    fill_blocks(model)
    wrapper = model.base_model.model.model.embed_tokens
    wrapper.token_adapter.trainable_tokens_delta["default"].data.add_(0.5)
    want = logits(model)
    assert not close(logits(get_peft_model(llama(), BoneConfig(r=4, target_modules=["q_proj"]))), want)
    model.save_pretrained(tmp_path)
    assert close(logits(PeftModel.from_pretrained(llama(), tmp_path)), want)
    model.merge_adapter()
    assert close(logits(model), want)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert close(logits(merged), want)
    assert isinstance(merged, LlamaForCausalLM)


def test_the_best_model_is_loaded_whatever_its_adapter_is_called(tmp_path):
    model = get_peft_model(llama(), BoneConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=3, learning_rate=30.0, eval_strategy="epoch", save_strategy="epoch", use_cpu=True,
        load_best_model_at_end=True, report_to="none", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/mine/adapter_model.safetensors")
    assert trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-3")
    for key, tensor in best.items():
        assert same_bits(model.get_parameter(f"{key}.mine"), tensor, Promise.STORED)
