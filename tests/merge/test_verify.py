"""A merged checkpoint against its base and adapters: right ones pass, a single wrong layer fails."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from verified_merges import BERT, LLAMA, fitting_adapter, lively, verify, write_merge

from flashbone import variants
from flashbone.errors import FormatError
from flashbone.files import miss, peft
from flashbone.merge import merge_checkpoint
from flashbone.merge.verify import LIMIT
from helpers.adapter_folders import tiny_bert, tiny_gpt2, tiny_llama, write_adapter
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, same_bits
from helpers.families import FAMILIES

pytestmark = pytest.mark.slow

MODELS = {"llama": (tiny_llama, LLAMA), "bert": (tiny_bert, BERT)}


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
    write_merge(tmp_path, *MODELS[case], variant, dtype)
    verification = verify(tmp_path)
    assert verification.ok
    assert verification.unexplained < LIMIT / 5
    assert verification.dtype == str(dtype).removeprefix("torch.")
    assert (verification.rounding > LIMIT) == (dtype != torch.float32)  # what is explained is more than what is allowed
    assert verification.relative_error < 2 * verification.rounding + LIMIT


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
    write_merge(tmp_path, *MODELS[case], dtype=dtype)
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = load_file(tmp_path / "out" / "model.safetensors")
    name = next(n for n in base if n.endswith((".k_proj.weight", ".query.weight")) and not base[n].equal(changed[n]))
    _change(tmp_path / "out", lambda state: wrong(state, base, name))
    verification = verify(tmp_path)
    assert not verification.ok
    assert verification.unexplained > 2 * LIMIT


@pytest.mark.parametrize(("variant", "dtype"), [("bone", torch.bfloat16), ("bat-col", torch.float32)], ids=str)
def test_several_adapters_with_weights_pass_and_wrong_ones_fail(tmp_path, variant, dtype):
    model = lively(tiny_llama()).to(dtype)
    model.save_pretrained(tmp_path / "base")
    fitting_adapter(tmp_path / "one", model, LLAMA[:3], variant)
    fitting_adapter(tmp_path / "two", model, LLAMA[1:], variant)
    _live(tmp_path, {"one": 0.7, "two": -0.3}, model, variant)
    assert verify(tmp_path, "one", "two", weights=[0.7, -0.3]).ok
    assert verify(tmp_path, "two", "one", weights=[-0.3, 0.7]).ok
    wrong = {
        "another weight": verify(tmp_path, "one", "two", weights=[0.7, -0.35]),
        "another sign": verify(tmp_path, "one", "two", weights=[0.7, 0.3]),
        "no weights": verify(tmp_path, "one", "two"),
        "weights exchanged": verify(tmp_path, "two", "one", weights=[0.7, -0.3]),
        "one missing": verify(tmp_path, "one", weights=[0.7]),
    }
    assert [what for what, verification in wrong.items() if verification.ok] == []


def test_another_base_fails(tmp_path):
    write_merge(tmp_path, tiny_llama, LLAMA)
    _change(tmp_path / "base", lambda state: state["model.layers.0.mlp.up_proj.weight"].mul_(1.01))
    assert not verify(tmp_path).ok


def test_values_that_are_not_finite_fail(tmp_path):
    write_merge(tmp_path, tiny_llama, LLAMA)
    _change(tmp_path / "out", lambda state: state["model.norm.weight"].fill_(float("nan")))
    assert not verify(tmp_path).ok


def test_a_merge_into_another_dtype_is_rounded_as_its_files_are(tmp_path):
    """An fp32 base in bf16 files, the norms left in fp32: each tensor counts by its own dtype."""
    write_merge(tmp_path, tiny_llama, LLAMA)

    def narrow(state):
        state |= {name: t.bfloat16() for name, t in state.items() if "norm" not in name}

    _change(tmp_path / "out", narrow)
    verification = verify(tmp_path)
    assert verification.ok
    assert verification.dtype == "bfloat16"
    assert verification.rounding > 10 * LIMIT


@pytest.mark.parametrize(
    ("weight", "dtype"), [(1.0, torch.float32), (0.5, torch.float32), (-0.5, torch.float16)], ids=str
)
def test_modules_to_save_and_biases_pass_and_are_looked_at(tmp_path, weight, dtype):
    model = lively(tiny_bert()).to(dtype)
    model.save_pretrained(tmp_path / "base")
    others = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    others["bert.encoder.layer.0.attention.self.query.base_layer.bias"] = torch.randn(16)
    fields = {"modules_to_save": ["classifier"], "bias": "bone_only", "task_type": "SEQ_CLS"}
    fitting_adapter(tmp_path / "adapter", model, ("query",), others=others, **fields)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", weights=[weight])
    assert verify(tmp_path, weights=[weight]).ok
    assert not verify(tmp_path, weights=[weight / 2]).ok
    for name in ("classifier.bias", "bert.encoder.layer.0.attention.self.query.bias"):
        _change(tmp_path / "out", lambda state, name=name: state[name].add_(0.1))
        assert not verify(tmp_path, weights=[weight]).ok, name
        _change(tmp_path / "out", lambda state, name=name: state[name].sub_(0.1))


def test_the_same_adapter_given_twice_counts_twice(tmp_path):
    write_merge(tmp_path, tiny_llama, LLAMA)
    shutil.rmtree(tmp_path / "out")
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"] * 2, tmp_path / "out", weights=[0.5, 0.25])
    assert verify(tmp_path, "adapter", "adapter", weights=[0.5, 0.25]).ok
    assert not verify(tmp_path, weights=[0.5]).ok


def test_adapters_of_miss_and_files_inside_their_folders_are_taken(tmp_path):
    write_merge(tmp_path, tiny_llama, LLAMA, "bat-col")
    (tmp_path / "miss").mkdir()
    miss.write(peft.read(tmp_path / "adapter"), tmp_path / "miss")
    for path in ("miss", "miss/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert verify(tmp_path, path).ok, path
        assert not verify(tmp_path, path, weights=[0.9]).ok, path


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
    write_merge(tmp_path, make, targets)
    assert verify(tmp_path).ok
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = next(n for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if not t.equal(base[n]))
    _change(tmp_path / "out", lambda state: state.update({name: base[name]}))
    assert not verify(tmp_path).ok


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (lambda: tiny_bert(classifier=False), "bert.encoder.layer.{}.attention.self.query", (4, 16)),
        (tiny_llama, "layers.{}.mlp.up_proj", (4, 28)),
    ],
    ids=["of a classifier, in the bare encoder", "of a bare decoder, in the language model"],
)
def test_adapters_whose_names_begin_elsewhere_pass_and_fail(tmp_path, make, name, shape):
    lively(make()).save_pretrained(tmp_path / "base")
    blocks = {name.format(n): torch.randn(shape) / 50 for n in range(2)}
    write_adapter(tmp_path / "adapter", "bone", blocks, target_modules=[name.rpartition(".")[2]])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert verify(tmp_path).ok
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert not verify(tmp_path).ok


def test_nothing_is_printed_and_the_hosts_stay_as_they_were(tmp_path, capfd):
    from transformers.utils import logging

    write_merge(tmp_path, tiny_bert, BERT)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_rng_state()
    capfd.readouterr()
    verify(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before[:2]
    assert same_bits(torch.get_rng_state(), before[2], Promise.UNTOUCHED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_checkpoint_lacks_is_the_same_in_both(tmp_path, dtype):
    """A classifier whose head is new: transformers makes it of random numbers in fp32, twice the same ones."""
    write_merge(tmp_path, tiny_bert, BERT, dtype=dtype)
    for folder in ("base", "out"):
        _change(tmp_path / folder, lambda state: [state.pop(n) for n in list(state) if n.startswith("classifier")])
    assert verify(tmp_path).ok
    _change(tmp_path / "out", lambda state: state.pop("bert.pooler.dense.weight"))
    with pytest.raises(FormatError, match=r"out: it lacks bert\.pooler\.dense\.weight, which the base has"):
        verify(tmp_path)
