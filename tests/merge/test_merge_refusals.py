"""Bad input of `merge_checkpoint`: one clear line, and nothing written."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashbone.errors import FlashboneError, FormatError, NonFiniteError, ShapeError
from flashbone.files import outputs
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import blocks_for, listing, tiny_bert, tiny_gpt2, tiny_llama, write_adapter


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder, max_shard_size="6KB")
    return folder


@pytest.fixture
def place(tmp_path, llama_base):
    """A folder with a sharded base and an adapter that fits it."""
    shutil.copytree(llama_base, tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", {"model.layers.0.self_attn.q_proj": torch.randn(4, 20)})
    return tmp_path


def check_refused(place, *words, kind=FlashboneError, base="base", adapter="adapter", out="out") -> str:
    before = listing(place)
    with pytest.raises(kind) as caught:
        merge_checkpoint(place / base, place / adapter, place / out)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert listing(place) == before
    return message


def _set_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_the_folders_of_this_file_merge_when_nothing_is_wrong(place):
    assert merge_checkpoint(place / "base", place / "adapter", place / "out").merged == 1


def test_a_missing_base_is_named(place):
    check_refused(place, "nowhere: no such base model folder", base="nowhere", kind=FormatError)


def test_swapped_arguments_are_recognised(place):
    check_refused(place, "is an adapter", "BASE ADAPTER OUT", base="adapter", adapter="base", kind=FormatError)


def test_an_empty_base_is_refused(place):
    (place / "empty").mkdir()
    check_refused(place, "holds no model, wanted model.safetensors", base="empty", kind=FormatError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-q4.gguf", "tf_model.h5", "model.fp16.safetensors"])
def test_a_base_in_another_format_is_refused_with_the_way_out(place, name):
    (place / "other").mkdir()
    (place / "other" / name).touch()
    way_out = "convert_hf_to_gguf" if name.endswith(".gguf") else "save_pretrained()"
    check_refused(place, name, way_out, base="other", kind=FormatError)


def test_a_gguf_file_is_refused_with_the_way_out(place):
    (place / "model.gguf").touch()
    check_refused(place, "GGUF", "merge into the original", base="model.gguf", kind=FormatError)


def test_a_single_file_is_refused(place):
    (place / "model.safetensors").touch()
    check_refused(place, "wanted the folder", base="model.safetensors", kind=FormatError)


def test_a_quantised_base_is_refused_with_the_way_out(place):
    _set_config(place / "base", quantization_config={"quant_method": "gptq", "bits": 4})
    check_refused(place, "quantised (gptq)", "unquantised model, then quantise", kind=FormatError)


def test_weights_of_few_bits_are_refused_even_if_the_config_is_silent(place):
    (place / "base" / "model.safetensors.index.json").unlink()
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.ones(20, 20).to(torch.float8_e4m3fn)}
    save_file(weights, place / "base" / "model.safetensors")
    check_refused(place, "q_proj.weight", "F8_E4M3", "unquantised", kind=ShapeError)


def test_missing_shards_are_all_named(place):
    shards = sorted((place / "base").glob("*.safetensors"))[:2]
    for shard in shards:
        shard.unlink()
    check_refused(place, *(shard.name for shard in shards), "missing", kind=FormatError)


def test_a_truncated_shard_is_refused(place):
    shard = sorted((place / "base").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    check_refused(place, shard.name, "truncated", kind=FormatError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "beside the index"),
        ('{"weight_map": {"a": "config.json"}}', "beside the index"),
    ],
)
def test_a_broken_index_is_refused(place, text, words):
    (place / "base" / "model.safetensors.index.json").write_text(text)
    check_refused(place, "model.safetensors.index.json", words, kind=FormatError)


def test_an_index_that_does_not_match_its_shards_is_refused(place):
    index = place / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    check_refused(place, "model.ghost.weight", kind=FormatError)


def test_a_tensor_in_two_shards_is_refused(place):
    first, second = sorted((place / "base").glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, first)
    check_refused(place, "in another shard as well", kind=FormatError)


def test_a_broken_adapter_is_refused(place):
    file = place / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    check_refused(place, "adapter_model.safetensors", "truncated", kind=FormatError)


def test_every_module_that_the_base_lacks_is_named(place):
    blocks = {f"model.layers.{n}.self_attn.q_proj": torch.randn(4, 20) for n in (0, 7, 8)}
    write_adapter(place / "adapter", "bone", blocks)
    message = check_refused(
        place, "layers.7", "layers.8", "not in the base", "adapter of another model", kind=FormatError
    )
    assert "layers.0" not in message


def test_every_block_that_does_not_fit_is_named(place):
    blocks = {f"model.layers.{n}.self_attn.{k}_proj": torch.randn(4, 20) for n in (0, 1) for k in "qkv"}
    write_adapter(place / "adapter", "bone", blocks)
    message = check_refused(place, kind=ShapeError)
    for name in ("layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj", "layers.0.self_attn.v_proj"):
        assert name in message
    assert "q_proj" not in message
    assert "(4, 20)" in message


def test_a_block_on_what_is_no_linear_layer_is_refused(place):
    write_adapter(place / "adapter", "bone", {"model.norm": torch.randn(4, 20)})
    check_refused(place, "model.norm.weight", "not that of a layer that can be adapted", kind=ShapeError)


def test_a_head_that_the_base_lacks_is_refused_with_the_way_out(tmp_path):
    tiny_bert(classifier=False).save_pretrained(tmp_path / "base")
    blocks = blocks_for(tiny_bert(), "bone", ("query",), 4)
    others = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    write_adapter(tmp_path / "adapter", "bone", blocks, others=others, modules_to_save=["classifier"])
    check_refused(
        tmp_path, "classifier.weight", "classifier.bias", "merge_and_unload()", "not in the base", kind=FormatError
    )


def test_a_smaller_embedding_is_refused_with_the_way_out(place):
    others = {"model.embed_tokens.weight": torch.randn(40, 20)}
    blocks = {"model.layers.0.self_attn.q_proj": torch.randn(4, 20)}
    _set_config(place / "base", tie_word_embeddings=False)
    write_adapter(place / "adapter", "bone", blocks, others=others)
    check_refused(place, "(40, 20)", "(50, 20)", "resized", "merge_and_unload()", kind=ShapeError)


def test_a_grown_embedding_is_refused_where_the_other_one_did_not_grow(place):
    shutil.rmtree(place / "base")
    tiny_llama(tie_word_embeddings=False).save_pretrained(place / "base")
    blocks = {"model.layers.0.self_attn.q_proj": torch.randn(4, 20)}
    write_adapter(place / "adapter", "bone", blocks, others={"model.embed_tokens.weight": torch.randn(60, 20)})
    check_refused(place, "lm_head.weight", "does not grow it", "60 rows", kind=ShapeError)


@pytest.mark.parametrize(
    ("blocks", "others"),
    [
        ({"lm_head": torch.randn(4, 50)}, {}),
        ({"model.layers.0.self_attn.q_proj": torch.randn(4, 20)}, {"lm_head.weight": torch.randn(50, 20)}),
        ({"model.layers.0.self_attn.q_proj": torch.randn(4, 20)}, {"model.embed_tokens.weight": torch.randn(50, 20)}),
    ],
)
def test_changing_one_of_two_tied_embeddings_is_refused(place, blocks, others):
    write_adapter(place / "adapter", "bone", blocks, others=others)
    check_refused(place, "ties its output embedding", "tie_word_embeddings", kind=FormatError)


def test_a_conv1d_name_without_a_model_type_is_refused(tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "base")
    _set_config(tmp_path / "base", model_type=None)
    write_adapter(tmp_path / "adapter", "bone", blocks_for(model, "bone", ("c_proj",), 4))
    check_refused(tmp_path, "h.0.attn.c_proj.weight", "model_type", kind=FormatError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_that_is_not_finite_is_refused(place, value):
    block = torch.randn(4, 20)
    block[1, 3] = value
    write_adapter(place / "adapter", "bone", {"model.layers.1.self_attn.q_proj": block})
    check_refused(place, "model.layers.1.self_attn.q_proj.weight", "NaN", kind=NonFiniteError)


def test_a_replacement_that_is_not_finite_is_refused(place):
    others = {"model.norm.weight": torch.full((20,), float("nan"))}
    blocks = {"model.layers.0.self_attn.q_proj": torch.randn(4, 20)}
    write_adapter(place / "adapter", "bone", blocks, others=others, modules_to_save=["model.norm"])
    check_refused(place, "model.norm.weight", "NaN", kind=NonFiniteError)


def test_overflow_of_the_base_dtype_is_refused(tmp_path):
    tiny_llama().half().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", {"model.layers.0.self_attn.q_proj": torch.full((4, 20), 1e5)})
    check_refused(tmp_path, "q_proj.weight", "infinite", kind=NonFiniteError)


def test_an_output_that_exists_is_refused(place):
    (place / "out").mkdir()
    (place / "out" / "precious.txt").write_text("kept")
    check_refused(place, "out: exists already")
    (place / "file").touch()
    check_refused(place, "file: exists already", out="file")
    check_refused(place, "is a file", out="file/out")
    (place / "link").symlink_to(place / "nowhere")
    check_refused(place, "link: exists already", out="link")


@pytest.mark.parametrize("out", ["base", "base/merged", "adapter/../base/x"])
def test_an_output_in_the_base_is_refused(place, out):
    check_refused(place, "must not be", "or lie inside it", out=out)


def test_a_full_disk_is_noticed_before_anything_is_written(place, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: usage)
    check_refused(place, "no disk space left", "GiB are needed", "0.00 GiB are free", out="new/out")
    left = place / ".out.abc.partial"
    left.mkdir()
    check_refused(place, "no disk space left", str(left))
