"""What inspecting a model reports, against real models, real adapters and real optimisers."""

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    AlbertConfig,
    BertConfig,
    CLIPVisionConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    T5Config,
    ViTConfig,
)

from flashbone import BoneConfig
from flashbone.errors import ConfigError
from flashbone.inspect.model import inspect_model
from flashbone.tuner.layers.layer import BoneLayer
from helpers.adapter_folders import tiny_bert, tiny_gpt2, tiny_llama
from helpers.blocks import VARIANT_NAMES

pytestmark = pytest.mark.slow

CASES = [
    *((tiny_llama, {"variant": name, "r": 4, "mini_r": 3}) for name in VARIANT_NAMES),
    (tiny_gpt2, {"r": 6}),
    (tiny_bert, {"r": 6, "task_type": "SEQ_CLS"}),
    (tiny_bert, {"r": 6, "bias": "all", "task_type": "SEQ_CLS"}),
    (tiny_gpt2, {"r": 6, "bias": "bone_only", "target_modules": ["c_attn"]}),
    (tiny_llama, {"r": 6, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 3}}),
    (tiny_llama, {"bottleneck_size": 8, "target_modules": ["o_proj"], "layers_to_transform": [1]}),
]


def _described(model, folder):
    """The folder of a model of which only the config is there, and a file that nobody must read."""
    folder.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not to be read")
    return folder


def _saved_bytes(model, folder) -> int:
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(("make", "fields"), CASES)
def test_parameters_file_and_memory_are_those_of_a_real_adapter(tmp_path, make, fields):
    model = make()
    described = _described(model, tmp_path / "base")
    report = inspect_model(described, fields, dtype=torch.float32)
    parameters = model.num_parameters()
    base_bytes = sum(p.nbytes for p in model.parameters())
    model = get_peft_model(model, BoneConfig(**{"target_modules": "all-linear", **fields}))

    assert report.parameters == parameters
    assert report.base_bytes == base_bytes
    costs = report.costs
    assert costs.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert costs.percent_of_base == pytest.approx(100 * costs.trainable_parameters / parameters)
    assert costs.file_bytes == _saved_bytes(model, tmp_path / "adapter")

    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert costs.state_bytes == sum(t.nbytes for t in [*moments, *(p.grad for p in trained)])
    assert costs.weight_bytes == sum(p.nbytes for p in model.parameters()) - base_bytes
    memory = costs.weight_bytes + costs.state_bytes + costs.activation_bytes
    assert costs.training_bytes == base_bytes + memory


@pytest.mark.parametrize(("make", "fields"), CASES)
def test_the_lines_are_the_layers_and_add_up_to_the_totals(tmp_path, make, fields):
    model = make()
    report = inspect_model(_described(model, tmp_path), fields)
    model = get_peft_model(model, BoneConfig(**{"target_modules": "all-linear", **fields}))
    blocks = [m.bone_block["default"] for m in model.modules() if isinstance(m, BoneLayer)]
    assert sum(group.layers for group in report.layers) == len(blocks)
    assert sum(group.trainable_parameters for group in report.layers) == sum(block.numel() for block in blocks)
    lines = [*report.layers, *report.others]
    assert sum(line.trainable_parameters for line in lines) == report.costs.trainable_parameters
    assert sum(line.training_bytes for line in lines) == report.costs.training_bytes - report.base_bytes
    assert sum(group.activation_bytes for group in report.layers) == report.costs.activation_bytes
    assert sum(group.multiply_adds for group in report.layers) == pytest.approx(report.costs.multiply_adds)


@pytest.mark.parametrize(("make", "fields"), CASES)
def test_the_lora_beside_it_is_pefts_of_the_nearest_rank(tmp_path, make, fields):
    model = make()
    report = inspect_model(_described(model, tmp_path / "base"), fields, dtype=torch.float32)
    model = get_peft_model(model, BoneConfig(**{"target_modules": "all-linear", **fields}))
    names = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, BoneLayer)]
    bias = fields.get("bias", "none").replace("bone", "lora")
    same = {name: fields[name] for name in ("modules_to_save", "task_type") if name in fields}

    def twin(rank):
        config = LoraConfig(r=rank, target_modules=names, bias=bias, fan_in_fan_out=make is tiny_gpt2, **same)
        return get_peft_model(make(), config)

    rank = report.lora.r
    sizes = {r: twin(r).get_nb_trainable_parameters()[0] for r in (rank - 1, rank, rank + 1) if r > 0}
    assert report.lora.trainable_parameters == sizes[rank]
    assert min(sizes, key=lambda r: abs(sizes[r] - report.costs.trainable_parameters)) == rank
    assert report.lora.file_bytes == _saved_bytes(twin(rank), tmp_path / "lora")


def test_an_input_that_several_layers_see_is_kept_once(tmp_path):
    report = inspect_model(_described(tiny_llama(), tmp_path), {"variant": "bat-row", "r": 5}, tokens=100)
    kept = {group.modules.rpartition(".")[2]: group.activation_bytes for group in report.layers}
    blocks = {
        group.modules.rpartition(".")[2]: group.trainable_parameters * 2 for group in report.layers
    }  # cast to bf16
    x, wide = 2 * 100 * 20 * 2, 2 * 100 * 28 * 2  # two layers, tokens, features, bytes
    inputs = {"q_proj": x, "k_proj": 0, "v_proj": 0, "o_proj": x, "gate_proj": x, "up_proj": 0, "down_proj": wide}
    assert kept == {name: inputs[name] + blocks[name] for name in inputs}


def test_a_layer_that_is_called_many_times_has_one_block_and_many_calls(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "embedding_size": 16}
    fields = {"r": 8, "target_modules": ["query"]}
    reports = []
    for n in (1, 12):
        AlbertConfig(num_hidden_layers=n, **sizes).save_pretrained(tmp_path)
        reports.append(inspect_model(tmp_path, fields, tokens=10, dtype=torch.float32))
    one, twelve = (report.costs for report in reports)
    assert one.trainable_parameters == twelve.trainable_parameters == 8 * 32
    assert twelve.activation_bytes == 12 * one.activation_bytes == 12 * 10 * 8 * 4
    assert twelve.multiply_adds == 12 * one.multiply_adds


def test_a_model_that_cannot_be_run_without_weights_says_what_is_assumed(tmp_path):
    ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(
        tmp_path
    )
    report = inspect_model(tmp_path, {"variant": "bat-row", "r": 8}, tokens=10, dtype=torch.float32)
    assert report.assumption.endswith("with an input that no other layer sees: its input is not text.")
    assert report.costs.activation_bytes == 4 * 10 * sum(g.layers * g.in_features for g in report.layers)


def test_layers_that_text_does_not_reach_count_as_called_once(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=4, patch_size=2)
    LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small, vocab_size=50)).save_pretrained(tmp_path)
    report = inspect_model(tmp_path, {"variant": "bat-row", "r": 8}, tokens=10, dtype=torch.float32)
    inputs = {group.modules: group.activation_bytes for group in report.layers}
    assert inputs["vision_tower.encoder.layers.0.self_attn.q_proj"] == 10 * 16 * 4
    assert inputs["vision_tower.encoder.layers.0.self_attn.v_proj"] == 10 * 16 * 4
    assert inputs["language_model.layers.0.self_attn.q_proj"] == 10 * 16 * 4
    assert inputs["language_model.layers.0.self_attn.v_proj"] == 0
    assert "Linear layers that a run on text does not call" in report.assumption


@pytest.mark.parametrize("config", [DebertaV2Config, OPTConfig, T5Config, GPT2Config])
def test_models_with_other_masks_are_run_too(tmp_path, config):
    config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50).save_pretrained(tmp_path)
    assumption = inspect_model(tmp_path, {"r": 8}).assumption
    if config is OPTConfig and Version(transformers.__version__) < Version("5.23"):  # some older versions need weights
        assert assumption == "" or assumption.endswith("it cannot be run without weights (RuntimeError).")
    else:
        assert assumption == ""


def test_half_precision_halves_the_base_and_not_the_adapter(tmp_path):
    _described(tiny_llama(), tmp_path)
    full, half = (inspect_model(tmp_path, {"r": 4}, dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert full.base_bytes == 2 * half.base_bytes
    assert (full.costs.file_bytes, full.costs.weight_bytes) == (half.costs.file_bytes, half.costs.weight_bytes)


def test_the_default_is_bone_and_the_published_setting_is_named_beside_it(tmp_path):
    LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    report = inspect_model(tmp_path)
    assert (report.costs.method, report.costs.r, report.recommended.r) == ("bone", 64, 32)
    assert (len(report.layers), report.is_recommended) == (7, False)
    assert len(inspect_model(tmp_path, {"target_modules": ["q_proj"]}).layers) == 1
    assert inspect_model(tmp_path, {"bottleneck_size": None, "r": None}).costs == report.costs
    published = {"bottleneck_size": 32, "dropout": 0.1}
    assert inspect_model(tmp_path, published).is_recommended
    assert not inspect_model(tmp_path, published | {"dropout": 0.0}).is_recommended
    assert not inspect_model(tmp_path, published | {"rank_pattern": {"q_proj": 16}}).is_recommended


@pytest.mark.slow
def test_above_13b_nothing_is_published(tmp_path):
    LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80).save_pretrained(tmp_path)
    report = inspect_model(tmp_path)
    assert report.parameters > 60e9
    assert (report.costs.method, report.costs.r, report.recommended) == ("bone", 64, None)
    assert inspect_model(tmp_path, {"variant": None, "r": None}).costs == report.costs


def test_a_quantised_config_is_counted_as_the_plain_model(tmp_path):
    config = tiny_llama().config
    plain = inspect_model(_described(tiny_llama(), tmp_path), {"r": 4})
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    report = inspect_model(tmp_path, {"r": 4})
    assert report.quantised_by == "bitsandbytes"
    assert (report.parameters, report.base_bytes) == (plain.parameters, plain.base_bytes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4, "target_modules": ["nowhere"]}, "nowhere"),
        ({"r": -1}, "positive integer"),
        ({"unknown": 1}, "unknown"),
        ({"r": 4, "target_modules": "*.q_proj"}, "is not a regular expression"),
        ({"r": 4, "exclude_modules": "["}, "is not a regular expression"),
        ({"r": 4, "rank_pattern": {"[": 8}}, "is not a regular expression"),
        ({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "["}, "^adapter: "),
        ({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": "x"}, "^adapter: "),
        ({"r": 4, "modules_to_save": 5}, "^adapter: "),
        ({"layers_to_transform": [0]}, r"^adapter: layers_to_transform without target_modules.*\[q_proj, v_proj\]$"),
        ({"r": 4, "layers_pattern": "h"}, "^adapter: layers_pattern without target_modules"),
        ({"bottleneck_size": 24, "target_modules": ["q_proj"]}, "a bottleneck of 24 is larger than the 20 input"),
        ({"r": 4, "target_modules": ["embed_tokens"]}, "embed_tokens: inspect counts what linear layers cost"),
    ],
)
def test_a_wrong_adapter_is_said_in_one_line(tmp_path, fields, message):
    with pytest.raises((ConfigError, ValueError), match=message) as caught:
        inspect_model(_described(tiny_llama(), tmp_path), fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_step_without_tokens_is_refused(tmp_path, tokens):
    with pytest.raises(ConfigError, match=f"tokens: got {tokens}, wanted at least 1"):
        inspect_model(_described(tiny_llama(), tmp_path), tokens=tokens)


def _llama(**sizes):
    return LlamaConfig(vocab_size=32000, **sizes)


SHAPES = {
    "bert-base": BertConfig(architectures=["BertForMaskedLM"]),
    "1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "7b": _llama(),
    "13b": _llama(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}


@pytest.mark.parametrize(
    ("shape", "targets", "bottleneck", "parameters", "published"),
    [
        ("bert-base", ["attention.output"], 64, 49_152, 50e3),
        ("1b", "all-linear", 64, 458_752, 500e3),
        ("7b", "all-linear", 128, 3_670_016, 3.5e6),
    ],
)
def test_published_sizes_of_the_orthogonal_variant(tmp_path, shape, targets, bottleneck, parameters, published):
    SHAPES[shape].save_pretrained(tmp_path)
    report = inspect_model(tmp_path, {"bottleneck_size": bottleneck, "target_modules": targets})
    assert report.costs.trainable_parameters == parameters == pytest.approx(published, rel=0.1)
    assert report.costs.file_bytes == pytest.approx(4 * published, rel=0.1)  # 200 KB, 2 MB, 14 MB


def test_no_natural_setting_has_the_size_that_is_published_for_13b(tmp_path):
    """6.5M: every choice of whole kinds of layers in all 40 layers, at every block size that was published."""
    SHAPES["13b"].save_pretrained(tmp_path)
    report = inspect_model(tmp_path, {"bottleneck_size": 256})
    assert report.costs.trainable_parameters == 18_350_080
    assert {group.layers for group in report.layers} == {40}
    sizes = {40 * kinds * r * r for kinds in range(1, 8) for r in (32, 64, 128, 256)}
    assert min(abs(size / 6.5e6 - 1) for size in sizes) > 0.15
