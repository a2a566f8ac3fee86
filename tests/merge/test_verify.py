"""The comparison of a merged model with its base and adapters: right merges pass, wrong ones fail, in every dtype."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashbone import variants
from flashbone.checkpoint import miss, peft
from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.merge import merge_checkpoint
from flashbone.verify import LIMIT, check_verifiable, compare_logits
from helpers.adapter_folders import blocks_for, tiny_bert, tiny_gpt2, tiny_llama, write_adapter
from helpers.blocks import VARIANT_NAMES
from helpers.families import FAMILIES

LLAMA, BERT = ("q_proj", "k_proj", "o_proj", "down_proj"), ("query", "key", "dense")
MODELS = {"llama": (tiny_llama, LLAMA), "bert": (tiny_bert, BERT)}


def _adapter(folder: Path, model: nn.Module, targets: tuple[str, ...], variant: str = "bone", **fields) -> Path:
    """Blocks whose deltas are 3% of their weights, as trained ones are."""
    blocks = {}
    for name, block in blocks_for(model, variant, targets, 6, 0.01).items():
        W = model.get_submodule(name).weight.detach().float()
        W = W.mT if type(model.get_submodule(name)).__name__ == "Conv1D" else W
        blocks[name] = block * 0.03 * W.norm() / variants.get(variant).delta(W, block).norm()
    return write_adapter(folder, variant, blocks, r=6, target_modules=list(targets), **fields)


def _lively(model: nn.Module) -> nn.Module:
    """With matrices as large as trained ones: in a new model, queries and keys change next to nothing."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)
    return model


def _merged(place: Path, make, targets, variant: str = "bone", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Base, adapter and merged model in `place`."""
    model = _lively(make()).to(dtype)
    model.save_pretrained(place / "base")
    _adapter(place / "adapter", model, targets, variant)
    merge_checkpoint(place / "base", place / "adapter", place / "out")
    return model


def _verify(place: Path, *adapters: str, weights: list[float] | None = None):
    return compare_logits(place / "base", [place / a for a in adapters or ("adapter",)], weights, place / "out")


def _change(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def _live(place: Path, weights: dict[str, float], model: nn.Module, variant: str) -> None:
    """The merge of several adapters, by hand, into `out`."""
    (place / "out").mkdir()
    shutil.copy(place / "base" / "config.json", place / "out")
    state = load_file(place / "base" / "model.safetensors")
    terms: dict[str, list] = {}
    for name, weight in weights.items():
        for key, block in load_file(place / name / "adapter_model.safetensors").items():
            module = key.removeprefix("base_model.model.").removesuffix(".bone_block")
            terms.setdefault(f"{module}.weight", []).append((variants.get(variant), block, weight))
    for name, adapters in terms.items():
        state[name] = variants.merged_weight(state[name], adapters)
    save_file(state, place / "out" / "model.safetensors", metadata={"format": "pt"})


RIGHT = [("llama", variant, torch.bfloat16) for variant in VARIANT_NAMES]
RIGHT += [("llama", "bone", torch.float32), ("bert", "bat-col", torch.float32), ("bert", "bone", torch.float16)]


@pytest.mark.parametrize(("case", "variant", "dtype"), RIGHT, ids=str)
def test_right_merges_pass(tmp_path, case, variant, dtype):
    _merged(tmp_path, *MODELS[case], variant, dtype)
    found = _verify(tmp_path)
    assert found.ok
    assert found.unexplained < LIMIT / 5
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert (found.rounding > LIMIT) == (dtype != torch.float32)  # what is explained is more than what is allowed
    assert found.relative_error < 2 * found.rounding + LIMIT


def _swapped(state: dict[str, Tensor], base: dict[str, Tensor], name: str) -> None:
    """Two shards of the block that was merged, exchanged: what the wrong layout would do."""
    delta = state[name].float() - base[name].float()
    state[name] = (base[name].float() + delta.roll(6, 0)).to(state[name].dtype)


def _signed(state: dict[str, Tensor], base: dict[str, Tensor], name: str) -> None:
    state[name] = (2 * base[name].float() - state[name].float()).to(state[name].dtype)


def _absent(state: dict[str, Tensor], base: dict[str, Tensor], name: str) -> None:
    state[name] = base[name]


def _heavy(state: dict[str, Tensor], base: dict[str, Tensor], name: str) -> None:
    delta = state[name].float() - base[name].float()
    state[name] = (base[name].float() + 1.2 * delta).to(state[name].dtype)


@pytest.mark.parametrize("wrong", [_swapped, _signed, _absent, _heavy])
@pytest.mark.parametrize(("case", "dtype"), [("llama", torch.bfloat16), ("bert", torch.float32)], ids=str)
def test_one_wrong_layer_fails(tmp_path, case, wrong, dtype):
    _merged(tmp_path, *MODELS[case], dtype=dtype)
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = load_file(tmp_path / "out" / "model.safetensors")
    name = next(n for n in base if n.endswith((".k_proj.weight", ".query.weight")) and not base[n].equal(changed[n]))
    _change(tmp_path / "out", lambda state: wrong(state, base, name))
    found = _verify(tmp_path)
    assert not found.ok
    assert found.unexplained > 2 * LIMIT


@pytest.mark.parametrize(("variant", "dtype"), [("bone", torch.bfloat16), ("bat-col", torch.float32)], ids=str)
def test_several_adapters_with_weights_pass_and_wrong_ones_fail(tmp_path, variant, dtype):
    model = _lively(tiny_llama()).to(dtype)
    model.save_pretrained(tmp_path / "base")
    _adapter(tmp_path / "one", model, LLAMA[:3], variant)
    _adapter(tmp_path / "two", model, LLAMA[1:], variant)
    _live(tmp_path, {"one": 0.7, "two": -0.3}, model, variant)
    assert _verify(tmp_path, "one", "two", weights=[0.7, -0.3]).ok
    assert _verify(tmp_path, "two", "one", weights=[-0.3, 0.7]).ok
    wrong = {
        "another weight": _verify(tmp_path, "one", "two", weights=[0.7, -0.35]),
        "another sign": _verify(tmp_path, "one", "two", weights=[0.7, 0.3]),
        "no weights": _verify(tmp_path, "one", "two"),
        "weights exchanged": _verify(tmp_path, "two", "one", weights=[0.7, -0.3]),
        "one missing": _verify(tmp_path, "one", weights=[0.7]),
    }
    assert [what for what, found in wrong.items() if found.ok] == []


def test_another_base_fails(tmp_path):
    _merged(tmp_path, tiny_llama, LLAMA)
    _change(tmp_path / "base", lambda state: state["model.layers.0.mlp.up_proj.weight"].mul_(1.01))
    assert not _verify(tmp_path).ok


def test_values_that_are_not_finite_fail(tmp_path):
    _merged(tmp_path, tiny_llama, LLAMA)
    _change(tmp_path / "out", lambda state: state["model.norm.weight"].fill_(float("nan")))
    assert not _verify(tmp_path).ok


def test_a_merge_into_another_dtype_is_rounded_as_its_files_are(tmp_path):
    """An fp32 base in bf16 files, the norms left in fp32: each tensor counts by its own dtype."""
    _merged(tmp_path, tiny_llama, LLAMA)

    def narrow(state):
        state |= {name: t.bfloat16() for name, t in state.items() if "norm" not in name}

    _change(tmp_path / "out", narrow)
    found = _verify(tmp_path)
    assert found.ok
    assert found.dtype == "bfloat16"
    assert found.rounding > 10 * LIMIT


@pytest.mark.parametrize(
    ("weight", "dtype"), [(1.0, torch.float32), (0.5, torch.float32), (-0.5, torch.float16)], ids=str
)
def test_modules_to_save_and_biases_pass_and_are_looked_at(tmp_path, weight, dtype):
    model = _lively(tiny_bert()).to(dtype)
    model.save_pretrained(tmp_path / "base")
    others = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    others["bert.encoder.layer.0.attention.self.query.base_layer.bias"] = torch.randn(16)
    fields = {"modules_to_save": ["classifier"], "bias": "bone_only", "task_type": "SEQ_CLS"}
    _adapter(tmp_path / "adapter", model, ("query",), others=others, **fields)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", weights=[weight])
    assert _verify(tmp_path, weights=[weight]).ok
    assert not _verify(tmp_path, weights=[weight / 2]).ok
    for name in ("classifier.bias", "bert.encoder.layer.0.attention.self.query.bias"):
        _change(tmp_path / "out", lambda state, name=name: state[name].add_(0.1))
        assert not _verify(tmp_path, weights=[weight]).ok, name
        _change(tmp_path / "out", lambda state, name=name: state[name].sub_(0.1))


def test_the_same_adapter_given_twice_counts_twice(tmp_path):
    _merged(tmp_path, tiny_llama, LLAMA)
    shutil.rmtree(tmp_path / "out")
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"] * 2, tmp_path / "out", weights=[0.5, 0.25])
    assert _verify(tmp_path, "adapter", "adapter", weights=[0.5, 0.25]).ok
    assert not _verify(tmp_path, weights=[0.5]).ok


def test_adapters_of_miss_and_files_inside_their_folders_are_taken(tmp_path):
    _merged(tmp_path, tiny_llama, LLAMA, "bat-col")
    (tmp_path / "miss").mkdir()
    miss.write(peft.read(tmp_path / "adapter"), tmp_path / "miss")
    for path in ("miss", "miss/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert _verify(tmp_path, path).ok, path
        assert not _verify(tmp_path, path, weights=[0.9]).ok, path


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_gpt2, ("c_attn", "c_proj")),
        (lambda: FAMILIES["t5"].make().eval(), ("q", "v", "wo")),
        (lambda: FAMILIES["llama"].make().eval(), ("q_proj", "up_proj")),  # a classifier without a padding token
        (lambda: FAMILIES["bart"].make().eval(), ("q_proj", "fc1")),  # classifies by the last token of all
        (lambda: FAMILIES["bert for pre-training"].make().eval(), ("query", "dense")),  # several outputs
    ],
    ids=["gpt2", "t5", "llama classifier", "bart classifier", "bert for pre-training"],
)
def test_models_of_every_kind_pass_and_fail(tmp_path, make, targets):
    _merged(tmp_path, make, targets)
    assert _verify(tmp_path).ok
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = next(n for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if not t.equal(base[n]))
    _change(tmp_path / "out", lambda state: state.update({name: base[name]}))
    assert not _verify(tmp_path).ok


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (lambda: tiny_bert(classifier=False), "bert.encoder.layer.{}.attention.self.query", (4, 16)),
        (tiny_llama, "layers.{}.mlp.up_proj", (4, 28)),
    ],
    ids=["of a classifier, in the bare encoder", "of a bare decoder, in the language model"],
)
def test_adapters_whose_names_begin_elsewhere_pass_and_fail(tmp_path, make, name, shape):
    _lively(make()).save_pretrained(tmp_path / "base")
    blocks = {name.format(n): torch.randn(shape) / 50 for n in range(2)}
    write_adapter(tmp_path / "adapter", "bone", blocks, target_modules=[name.rpartition(".")[2]])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert _verify(tmp_path).ok
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert not _verify(tmp_path).ok


def test_nothing_is_printed_and_the_hosts_stay_as_they_were(tmp_path, capfd):
    from transformers.utils import logging

    _merged(tmp_path, tiny_bert, BERT)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_rng_state()
    capfd.readouterr()
    _verify(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_a_checkpoint_lacks_is_the_same_in_both(tmp_path):
    """A classifier whose head is new: transformers makes it of random numbers, twice the same ones."""
    _merged(tmp_path, tiny_bert, BERT)
    for folder in ("base", "out"):
        _change(tmp_path / folder, lambda state: [state.pop(n) for n in list(state) if n.startswith("classifier")])
    assert _verify(tmp_path).ok
    _change(tmp_path / "out", lambda state: state.pop("bert.pooler.dense.weight"))
    with pytest.raises(FormatError, match=r"out: it lacks bert\.pooler\.dense\.weight, which the base has"):
        _verify(tmp_path)


def _refused(tmp_path: Path, message: str, adapters=("adapter",), weights=None, error=FormatError) -> None:
    with pytest.raises(error, match=rf"^[^\n]*{message}[^\n]*$"):
        _verify(tmp_path, *adapters, weights=weights)


def test_what_cannot_be_verified_is_refused_by_name(tmp_path):
    model = _merged(tmp_path, tiny_llama, LLAMA)
    _refused(tmp_path, "weights: got 2 for 1 adapters", weights=[1, 2], error=ConfigError)
    head = {"lm_head.weight": torch.randn(50, 20)}
    _adapter(tmp_path / "head", model, LLAMA, others=head, modules_to_save=["lm_head"])
    _refused(tmp_path, "head: holds values that take the place", ["adapter", "head"], error=ConfigError)
    _adapter(tmp_path / "other", tiny_bert(), BERT)
    _refused(tmp_path, "Target modules .* not found in the base model", ["other"], error=ConfigError)
    narrow = {f"model.layers.{n}.self_attn.q_proj": torch.randn(4, 12) for n in range(2)}
    write_adapter(tmp_path / "narrow", "bone", narrow, target_modules=["q_proj"])
    _refused(tmp_path, "q_proj: .*shape", ["narrow"], error=FlashboneError)
    torch.save({"emb.weight": torch.ones(2), "blocks.0.att.key.weight": torch.ones(2)}, tmp_path / "rwkv.pth")
    with pytest.raises(FormatError, match=r"rwkv\.pth: is no RWKV model, .*; it can be merged, but not verified$"):
        compare_logits(tmp_path / "rwkv.pth", [tmp_path / "adapter"], None, tmp_path / "out")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    _refused(tmp_path, "this is a LORA adapter")


def test_what_can_never_be_verified_is_known_before_a_merge(tmp_path):
    model = _lively(tiny_bert())
    model.save_pretrained(tmp_path / "base")
    adapter = _adapter(tmp_path / "adapter", model, BERT)
    head = {"classifier.bias": torch.randn(2)}
    head = _adapter(tmp_path / "head", model, BERT, others=head, modules_to_save=["classifier"])
    check_verifiable(tmp_path / "base", [adapter, adapter], [0.5, -0.5])
    check_verifiable(tmp_path / "base", [head], None)
    with pytest.raises(ConfigError, match="weights: got 1 for 2 adapters"):
        check_verifiable(tmp_path / "base", [adapter, adapter], [1.0])
    with pytest.raises(ConfigError, match="head: holds values that take the place"):
        check_verifiable(tmp_path / "base", [head, head], None)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(FormatError, match=r"base: has no config\.json"):
        check_verifiable(tmp_path / "base", [adapter], None)


def test_models_that_transformers_cannot_load_or_run_are_refused(tmp_path):
    _merged(tmp_path, tiny_llama, LLAMA)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "never heard of"}))
    _refused(tmp_path, "base: cannot be verified, .*never heard of")
    (tmp_path / "base" / "config.json").unlink()
    _refused(tmp_path, r"base: has no config\.json")
    FAMILIES["vit"].make().save_pretrained(tmp_path / "images")
    with pytest.raises(FormatError, match="images: cannot be verified, the model takes pixel_values, wanted token ids"):
        compare_logits(tmp_path / "images", [tmp_path / "adapter"], None, tmp_path / "images")
