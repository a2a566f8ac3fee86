"""Adapters converted for each engine, from a folder of BONE to what the engine loads."""

import json
import re

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from flashbone.conversion import convert, engines
from flashbone.errors import FormatError
from helpers.adapter_folders import blocks_for, listing, tiny_llama, write_adapter

LAYERS = ("q_proj", "k_proj", "down_proj")


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", "bone", blocks_for(tiny_llama(), "bone", LAYERS, 6), r=6)


@pytest.mark.parametrize(("engine", "rank"), [("vllm", 8), ("sglang", 6), ("tgi", 8)])
def test_engines_of_folders_get_what_their_checks_ask_for(base, adapter, engine, rank, tmp_path):
    report = convert(adapter, tmp_path / "out", engine=engine, base=base)
    assert (report.format, report.rank, report.exact) == ("lora", rank, True)
    assert "SERVE.md" in report.files
    assert report.serve is not None
    assert str(tmp_path / "out") in report.serve
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == rank
    assert config["bias"] == "none"
    assert not any(config.get(name) for name in ("modules_to_save", "use_dora", "use_rslora", "rank_pattern"))
    assert not config.get("alpha_pattern")
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(LAYERS)
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(state) == 2 * 2 * len(LAYERS)
    for key, value in state.items():
        assert re.fullmatch(
            r"base_model\.model\.model\.layers\.[01]\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight", key
        )
        assert value.shape[0 if ".lora_A." in key else 1] == rank


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
def test_engines_of_gguf_get_one_file_and_what_starts_it(base, adapter, engine, tmp_path):
    report = convert(adapter, tmp_path / "out", engine=engine, base=base)
    assert (report.format, report.rank, report.exact) == ("gguf", 6, True)
    beside = "Modelfile" if engine == "ollama" else "SERVE.md"
    assert listing(tmp_path / "out") == sorted(["README.md", beside, engines.GGUF])
    names = {tensor.name for tensor in GGUFReader(tmp_path / "out" / engines.GGUF).tensors}
    kinds = ("attn_q", "attn_k", "ffn_down")
    assert names == {f"blk.{i}.{kind}.weight.lora_{ab}" for i in range(2) for kind in kinds for ab in "ab"}
    alone = convert(adapter, tmp_path / "alone.gguf", engine=engine, base=base)
    assert alone.files == ("alone.gguf",)
    assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "out" / engines.GGUF).read_bytes()


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("vllm", "--tokenizer {0} --chat-template {0}/chat_template.jinja --generation-config {0}"),
        ("sglang", "--tokenizer-path {0} --chat-template {0}/chat_template.jinja"),
        ("tgi", "--tokenizer-config-path {0}/tokenizer_config.json"),
        ("llama.cpp", "--jinja --chat-template-file {0}/chat_template.jinja"),
    ],
)
def test_an_engine_gets_the_tokenizer_template_and_settings_that_the_adapter_brings(
    base, adapter, engine, options, tmp_path
):
    names = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json")
    content = {name: json.dumps({"eos_token_id": [2, 7]}) for name in names} | {"chat_template.jinja": "{{ messages }}"}
    for name in names:
        (adapter / name).write_text(content[name])
    report = convert(adapter, tmp_path / "out", engine=engine, base=base)
    assert report.serve is not None
    assert report.serve.endswith(options.format(tmp_path / "out"))
    assert options.format('"$PWD"') in (tmp_path / "out/SERVE.md").read_text()
    written = {name: (tmp_path / "out" / name).read_text() for name in names}
    if engine == "tgi":  # reads the template there alone
        both = json.loads(written.pop("tokenizer_config.json"))
        assert both == {"eos_token_id": [2, 7], "chat_template": "{{ messages }}"}
    assert written.items() <= content.items()
    words, _, remedy = report.beside.partition("; ")
    assert words == f"tokenizer of {adapter}, generation settings of {adapter}"
    assert remedy.endswith("does not read the settings: send the stop tokens [2, 7] with each request") == (
        engine != "vllm"
    )


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_nothing_is_left_of_an_adapter_that_an_engine_cannot_take(base, engine, tmp_path):
    blocks = blocks_for(tiny_llama(), "bone", LAYERS, 6)
    others = {"model.norm.modules_to_save.weight": torch.full((20,), 2.0)}
    adapter = write_adapter(tmp_path / "adapter", "bone", blocks, r=6, others=others, modules_to_save=["norm"])
    before = listing(tmp_path)
    with pytest.raises(FormatError, match=r"replace the base's: model\.norm\.weight"):
        convert(adapter, tmp_path / "out", engine=engine, base=base)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_copy_of_the_base_s_own_value_is_left_out(base, engine, tmp_path):
    """PEFT saves such a copy of an embedding along when its layer is adapted."""
    blocks = blocks_for(tiny_llama(), "bone", LAYERS, 6)
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    adapter = write_adapter(tmp_path / "adapter", "bone", blocks, r=6, others={"model.embed_tokens.weight": own})
    assert convert(adapter, tmp_path / "out", engine=engine, base=base).replaced == 0


def test_the_base_that_is_given_is_the_one_that_is_served(base, adapter, tmp_path):
    report = convert(adapter, tmp_path / "out", engine="vllm", base=base)
    assert report.serve is not None
    assert report.serve.startswith(f"vllm serve {base} ")
