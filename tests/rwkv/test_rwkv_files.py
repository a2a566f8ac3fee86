"""BlinkDL's files: read with every name and shape checked, and written."""

import re

import pytest
import torch

from flashbone.errors import ConfigError, FlashboneError, FormatError, NonFiniteError
from flashbone.rwkv import Rwkv6Config, Rwkv7Config, from_pth, read_config, to_pth
from helpers.adapter_folders import listing
from helpers.comparison import Promise, same_bits
from helpers.rwkv import write_rwkv

CONFIGS = {7: Rwkv7Config, 6: Rwkv6Config}


@pytest.fixture(params=[7, 6], ids=lambda v: f"v{v}")
def file(request, tmp_path):
    return request.param, write_rwkv(tmp_path / "base.pth", request.param)


def changed(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def refused(path, words):
    before = path.read_bytes() if path.is_file() else None
    for call in (read_config, from_pth):
        with pytest.raises(FormatError, match=re.escape(words)) as caught:
            call(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_sizes_come_from_the_shapes(file):
    version, path = file
    config = read_config(path)
    assert type(config) is CONFIGS[version]
    got = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_size, config.intermediate_size)
    assert got == (40, 32, 3, 8, 100)
    ranks = {7: (6, 5, 4, 7), 6: (3, 4)}
    names = {7: ("decay_rank", "rate_rank", "value_rank", "gate_rank"), 6: ("mix_rank", "decay_rank")}
    assert tuple(getattr(config, name) for name in names[version]) == ranks[version]


def test_a_file_comes_back_bit_for_bit(file, tmp_path):
    _, path = file
    state = torch.load(path, weights_only=True)
    model = from_pth(path)
    assert not model.training
    assert model.name_or_path == str(path)
    to_pth(model, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True, mmap=True)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert again[name].shape == tensor.shape
        assert same_bits(again[name], tensor, Promise.STORED), name


def test_vectors_without_their_axes_of_one_are_the_same_model(file):
    _, path = file
    want = {name: tensor.clone() for name, tensor in from_pth(path).state_dict().items()}  # the file stays mapped
    changed(path, lambda state: state.update({n: t.squeeze() for n, t in state.items() if t.shape[:2] == (1, 1)}))
    for name, tensor in from_pth(path).state_dict().items():
        assert same_bits(tensor, want[name], Promise.STORED), name


def test_the_dtype_is_the_file_s_or_the_one_asked_for(file, tmp_path):
    _, path = file
    changed(path, lambda state: state.update({n: t.bfloat16() for n, t in state.items()}))
    model = from_pth(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in from_pth(path, dtype=torch.float32).parameters()} == {torch.float32}
    to_pth(model, tmp_path / "wide.pth", dtype=torch.float32)
    wide = torch.load(tmp_path / "wide.pth", weights_only=True)
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert same_bits(wide["head.weight"], model.head.weight.float(), Promise.EXACT)


def test_tied_tensors_become_two_and_a_plain_name_is_no_repository_of_the_hub(file, tmp_path, monkeypatch):
    _, path = file
    changed(path, lambda state: state.update({"head.weight": state["emb.weight"]}))
    monkeypatch.chdir(tmp_path)
    model = from_pth(path.name, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == f"./{path.name}"
    assert model.head.weight.data_ptr() != model.emb.weight.data_ptr()
    assert same_bits(model.head.weight, model.emb.weight, Promise.EXACT)
    model.save_pretrained(tmp_path / "folder")


def test_the_first_block_s_unused_values_may_be_missing(tmp_path):
    path = write_rwkv(tmp_path / "base.pth", 7)
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        want = from_pth(path)(tokens).logits
    names = [f"blocks.0.att.v{i}" for i in range(3)]
    changed(path, lambda state: [state.pop(name) for name in names])
    model = from_pth(path)
    with torch.no_grad():
        assert same_bits(model(tokens).logits, want, Promise.SAME_PRODUCT)
    to_pth(model, tmp_path / "again.pth")
    assert not set(names) & torch.load(tmp_path / "again.pth", weights_only=True).keys()


def test_every_missing_unknown_and_misshapen_name_is_in_one_error(file):
    version, path = file

    def spoil(state):
        del state["blocks.1.ln2.bias"], state["blocks.2.att.key.weight"]
        state["blocks.0.ffn.s_emb.weight"] = torch.zeros(3)
        state["ln_out.weight"] = torch.zeros(31)
        state["ln_out.bias"] = torch.zeros(32, dtype=torch.int64)

    changed(path, spoil)
    refused(
        path,
        f"as an RWKV-{version} model: blocks.1.ln2.bias is missing; blocks.2.att.key.weight is missing;"
        " ln_out.weight has shape (31,), wanted (32,); ln_out.bias is I64, wanted F64, F32, BF16, F16;"
        " blocks.0.ffn.s_emb.weight is unknown",
    )


def test_other_versions_are_refused_by_name(tmp_path):
    path = tmp_path / "old.pth"
    common = {"emb.weight": torch.zeros(4, 8), "blocks.0.att.key.weight": torch.zeros(8, 8)}
    older = common | {"blocks.0.att.time_decay": torch.zeros(8), "blocks.0.att.time_mix_k": torch.zeros(1, 1, 8)}
    torch.save(older, path)
    refused(path, "is an RWKV-4 or 5 model; RWKV-6 and RWKV-7 can be loaded")
    torch.save(older | {"blocks.0.att.time_mix_g": torch.zeros(1, 1, 8)}, path)
    refused(path, "is an RWKV-5 model; RWKV-6 and RWKV-7 can be loaded")
    torch.save(common, path)
    refused(path, "is no RWKV model, it has none of blocks.0.att.r_k")
    torch.save({}, path)
    refused(path, "is no RWKV model")


def test_mixed_versions_are_refused_by_name(file):
    _, path = file
    both = ("blocks.0.att.r_k", "blocks.0.att.time_maa_x")
    changed(path, lambda state: [state.setdefault(name, torch.zeros(32)) for name in both])
    refused(path, f"mixes RWKV-7 and RWKV-6, it has {', '.join(both)}; take one model's file")


def test_a_truncated_file_is_refused(file):
    _, path = file
    whole = path.read_bytes()
    for size in (0, 10, 4000, len(whole) // 2, len(whole) - 7):
        path.write_bytes(whole[:size])
        refused(path, "it may be truncated or damaged, copy or download it again")
    path.unlink()
    refused(path, "no such file; the .pth file of an RWKV model was wanted")


def test_sizes_that_cannot_be_are_refused(file):
    version, path = file
    heads = "blocks.0.att.r_k" if version == 7 else "blocks.0.att.time_faaaa"
    changed(path, lambda state: state.update({heads: torch.zeros(4, 9)}))
    refused(path, "heads of 9 do not divide the width 32 of emb.weight")
    changed(path, lambda state: state.update({heads: torch.zeros(32)}))
    refused(path, f"{heads} has shape (32,), wanted 2 axes; is the file whole?")
    changed(path, lambda state: state.update({heads: torch.zeros(4, 8)}) or state.pop("emb.weight"))
    refused(path, "emb.weight is missing; is the file whole?")


def test_what_is_no_plain_model_is_not_written(file, tmp_path):
    _, path = file
    before = listing(tmp_path)
    model = from_pth(path)
    with pytest.raises(FlashboneError, match=r"base.pth: exists already"):
        to_pth(model, path)
    with pytest.raises(ConfigError, match=r"got .*out.bin, wanted a name that ends in .pth"):
        to_pth(model, tmp_path / "out.bin")
    with pytest.raises(ConfigError, match=r"got a Linear, wanted an RWKV model; call merge_and_unload\(\) first"):
        to_pth(torch.nn.Linear(2, 2), tmp_path / "out.pth")
    with pytest.raises(ConfigError, match=r"got torch.int8, wanted fp64, fp32, bf16 or fp16"):
        to_pth(model, tmp_path / "out.pth", dtype=torch.int8)
    model.blocks[1].att.key = torch.nn.Linear(32, 16)
    with pytest.raises(ConfigError, match=r"not a plain model: blocks.1.att.key.weight, blocks.1.att.key.bias;"):
        to_pth(model, tmp_path / "out.pth")
    assert listing(tmp_path) == before


def test_a_gap_between_blocks_is_refused_at_once(file):
    _, path = file
    changed(path, lambda state: state.update({"blocks.9999999.ln1.weight": torch.ones(32)}))
    refused(path, "has blocks.9999999, but no blocks.3; is the file whole?")
    changed(path, lambda state: state.pop("blocks.9999999.ln1.weight"))
    changed(path, lambda state: state.update({"blocks.x": torch.ones(32)}))
    refused(path, "blocks.x is unknown")


def test_numbers_too_large_for_the_dtype_are_not_written(file, tmp_path):
    model = from_pth(file[1])
    with torch.no_grad():
        model.ln_out.weight[3] = 1e5
    before = listing(tmp_path)
    with pytest.raises(NonFiniteError, match=r"ln_out\.weight has numbers too large for torch\.float16"):
        to_pth(model, tmp_path / "half.pth", torch.float16)
    assert listing(tmp_path) == before
    to_pth(model, tmp_path / "half.pth", torch.bfloat16)


def test_an_offloaded_model_is_not_written(file, tmp_path):
    places = {"emb": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk", "ln_out": "cpu", "head": "cpu"}
    model = from_pth(file[1], device_map=places, offload_folder=str(tmp_path / "offloaded"))
    with pytest.raises(ConfigError, match=r"to_pth: \d+ tensors are offloaded, such as blocks\.1\."):
        to_pth(model, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
