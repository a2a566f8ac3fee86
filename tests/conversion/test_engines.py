"""What the serving engines take, and what they are given; only llama.cpp is run, in tests/llamacpp."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashbone.conversion import engines
from flashbone.errors import ConfigError, FormatError
from flashbone.files.lora import Lora
from helpers.comparison import Promise, same_bits

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WHERE = Path("some-adapter")
Q = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))


def _factors(rank: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, 12), torch.randn(16, rank)


def _lora(*names: str, rank: int = 3, **fields) -> Lora:
    return Lora({name: _factors(rank) for name in names or Q}, **({"base_config": CONFIG} | fields))


@pytest.mark.parametrize(
    ("engine", "rank", "wanted"),
    [
        *(("vllm", rank, wanted) for rank, wanted in ((1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512))),
        *(("tgi", rank, wanted) for rank, wanted in ((1, 8), (9, 16), (40, 64), (128, 128), (129, 129))),
        *((name, 5, 5) for name in ("sglang", "llama.cpp", "ollama")),
    ],
)
def test_ranks_are_padded_with_zeros_to_one_that_the_engine_takes(engine, rank, wanted):
    lora = _lora(rank=rank)
    got = engines.get(engine).prepare(lora, WHERE)
    assert got.rank == wanted
    assert engines.get(engine).rank(rank) == wanted
    for name, (A, B) in lora.factors.items():
        wide_A, wide_B = got.factors[name]
        assert wide_A.shape == (wanted, 12)
        assert wide_B.shape == (16, wanted)
        assert same_bits(wide_A[:rank], A, Promise.STORED)
        assert same_bits(wide_B[:, :rank], B, Promise.STORED)
        assert not wide_A[rank:].any()
        assert not wide_B[:, rank:].any()


def test_a_rank_above_the_largest_is_refused():
    with pytest.raises(FormatError, match=r"some-adapter: rank 513 is more than the 512 of vLLM; ask for a smaller"):
        engines.get("vllm").prepare(_lora(rank=513), WHERE)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_replacements_and_embeddings_are_refused_by_name_and_at_once(engine):
    names = ("model.layers.0.self_attn.q_proj.bias", "model.norm.weight")
    replacements = {name: torch.ones(2) for name in names}
    embedding = "model.embed_tokens"
    lora = _lora(*Q, embedding, replacements=replacements, embeddings=frozenset({embedding}))
    with pytest.raises(FormatError) as caught:
        engines.get(engine).prepare(lora, WHERE)
    assert all(name in str(caught.value) for name in (*names, embedding, "merge it"))
    assert Q[1] not in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "name", "taken"),
    [
        ("vllm", "model.layers.0.self_attn.qkv_proj", True),
        ("sglang", "model.layers.0.mlp.gate_up_proj", True),
        ("sglang", "model.language_model.layers.0.mlp.up_proj", True),
        ("sglang", "lm_head", True),
        ("sglang", "model.layers.0.self_attn.dense", False),
        ("sglang", "model.vision_tower.encoder.layers.0.fc1", False),
        ("tgi", "lm_head", True),
        ("tgi", "model.layers.0.self_attn.qkv_proj", False),
        ("tgi", "layers.0.self_attn.q_proj", False),
    ],
)
def test_layers_that_an_engine_would_leave_out_in_silence_are_refused(engine, name, taken):
    lora = _lora(*Q, name, base_config={"num_hidden_layers": 1}) if engine == "tgi" else _lora(*Q, name)
    if taken:
        assert set(engines.get(engine).prepare(lora, WHERE).factors) == {*Q, name}
    else:
        with pytest.raises(FormatError, match=f"layers that it does not adapt: {re.escape(name)};"):
            engines.get(engine).prepare(lora, WHERE)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi"])
def test_layers_of_gpt2_are_refused_where_no_model_with_them_takes_loras(engine):
    name = "transformer.h.0.attn.c_attn"
    lora = _lora(name, conv1d=frozenset({name}))
    with pytest.raises(FormatError, match=rf"as \(in, out\): {name}"):
        engines.get(engine).prepare(lora, WHERE)


def test_tgi_gets_a_kind_of_layer_in_every_layer_or_not_at_all():
    tgi, up = engines.get("tgi"), "model.layers.0.mlp.up_proj"
    with pytest.raises(FormatError, match=f"others of their kind are not adapted: {re.escape(up)};"):
        tgi.prepare(_lora(*Q, up), WHERE)
    with pytest.raises(FormatError, match="some-adapter: how many layers the base has is not known; give"):
        tgi.prepare(_lora(base_config={}), WHERE)
    assert tgi.prepare(_lora(*Q, "lm_head"), WHERE).rank == 8


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
def test_engines_of_gguf_refuse_what_gguf_refuses(engine):
    with pytest.raises(FormatError, match="the base is a BertModel, wanted one of LlamaForCausalLM"):
        engines.get(engine).prepare(_lora(base_config={"architectures": ["BertModel"]}), WHERE)


def _arguments(command: str) -> list[str]:
    """What a shell makes of a command."""
    script = f"set -- {command}\nprintf '%s\\n' \"$@\""
    return subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (
            "vllm",
            ["vllm", "serve", "org/base", "--enable-lora", "--max-lora-rank", "3", "--lora-modules", "my-own=OUT"],
        ),
        ("llama.cpp", ["llama-server", "-m", "BASE.gguf", "--lora", "OUT/adapter.gguf"]),
        ("ollama", ["ollama", "create", "my-own", "-f", "OUT/Modelfile"]),
        ("sglang", ["python", "-m", "sglang.launch_server", "--model-path", "org/base"]),
        ("tgi", ["text-generation-launcher", "--model-id", "org/base", "--lora-adapters", "my-own=OUT"]),
    ],
)
def test_commands_name_the_base_and_the_adapter_whatever_its_path(engine, words, tmp_path):
    out = tmp_path / "it's in $HOME" / "my own"
    got = _arguments(engines.get(engine).command(_lora(base_model="org/base"), out))
    assert got[: len(words)] == [word.replace("OUT", str(out)) for word in words]


def test_a_base_that_is_a_folder_is_named_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "my base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _arguments(engines.get("vllm").command(_lora(base_model="my base"), Path("x")))[2] == str(
        tmp_path / "my base"
    )
    assert _arguments(engines.get("vllm").command(_lora(), Path("x")))[2] == "BASE"


def test_a_name_of_a_base_adds_no_line_to_a_modelfile(tmp_path):
    engines.get("ollama").write_extras(_lora(base_model="org/base\nFROM another"), tmp_path, tmp_path)
    assert (tmp_path / "Modelfile").read_text().count("\n") == 3


@pytest.mark.parametrize("base", ["here", "org/base", None])
def test_ollama_finds_a_modelfile_of_a_base_and_the_adapter(tmp_path, base):
    (tmp_path / "here").mkdir()
    base = str(tmp_path / base) if base == "here" else base
    assert engines.get("ollama").write_extras(_lora(base_model=base), tmp_path, tmp_path) == "Modelfile"
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0].startswith(f"# FROM: {base or 'the model that it was trained on'}, as a GGUF file")
    assert "0.34.1" in lines[0]
    assert lines[1:] == [f"FROM {base if base == str(tmp_path / 'here') else './base.gguf'}", "ADAPTER ./adapter.gguf"]


def test_the_command_for_a_single_gguf_writes_the_modelfile_beside_it(tmp_path):
    file = tmp_path / "my adapter.gguf"
    write, _, create = engines.get("ollama").command(_lora(), file).partition(" && ")
    subprocess.run(["sh", "-c", write], check=True)
    assert (tmp_path / "Modelfile").read_text().splitlines()[1:] == ["FROM ./base.gguf", "ADAPTER ./my adapter.gguf"]
    assert shlex.split(create) == ["ollama", "create", "my-adapter", "-f", str(tmp_path / "Modelfile")]
    assert _arguments(engines.get("llama.cpp").command(_lora(), file))[-1] == str(file)


@pytest.mark.parametrize(
    ("engine", "path"), [("vllm", ""), ("sglang", ""), ("tgi", ""), ("llama.cpp", "/adapter.gguf")]
)
def test_the_page_beside_an_adapter_has_the_command_for_that_folder(tmp_path, engine, path):
    assert engines.get(engine).write_extras(_lora(), tmp_path, Path("my adapter")) == "SERVE.md"
    text = (tmp_path / "SERVE.md").read_text()
    (command,) = (line.strip() for line in text.splitlines() if line.startswith("    "))
    assert f'"$PWD"{path}' in command
    assert not re.search(r"[{}]{2}|\{name|\{base", text)
    assert engine == "llama.cpp" or "my-adapter" in text


def test_engines_that_are_not_known_are_refused():
    with pytest.raises(
        ConfigError, match=r"engine: got 'tensorrt', wanted one of vllm, llama\.cpp, ollama, sglang, mlx, tgi"
    ):
        engines.get("tensorrt")
