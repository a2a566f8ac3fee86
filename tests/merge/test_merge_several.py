"""Several adapters of several variants with weights: the live model's bits, in any order; contradictions by name."""

import itertools

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashbone.cli import main
from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import blocks_for, listing, tiny_gpt2, tiny_llama, write_adapter
from helpers.comparison import Promise, close, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_folder_equals_the_live_model_with_all_adapters_active(tmp_path, make, dtype):
    base = make().to(dtype)
    base.save_pretrained(tmp_path / "base")
    targets = ("c_attn", "c_proj") if make is tiny_gpt2 else ("q_proj", "down_proj")
    weights = {"bone": 0.7, "bat-col": -0.3, "bat-row": 1.0, "orthogonal": 2.0, "mini": 0.1}
    for i, variant in enumerate(weights):
        blocks = blocks_for(base, variant, targets[: 1 + i % 2], 3 + i)
        write_adapter(tmp_path / variant, variant, blocks, r=3 + i, target_modules=list(targets[: 1 + i % 2]))
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    for i, name in enumerate(weights):  # in the model each goes by another name
        if i == 0:
            live = PeftModel.from_pretrained(live, tmp_path / name, adapter_name=f"z{name}")
        else:
            live.load_adapter(tmp_path / name, adapter_name=name)
    names = [f"z{name}" if name == "bone" else name for name in weights]
    for name, weight in zip(names, weights.values(), strict=True):
        for module in live.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(name, weight)
    live.base_model.set_adapter(names)
    want = live.merge_and_unload().state_dict()

    for n, order in enumerate(itertools.islice(itertools.permutations(weights), 0, 120, 50)):
        out = tmp_path / f"out{n}"
        report = merge_checkpoint(
            tmp_path / "base", [tmp_path / v for v in order], out, weights=[weights[v] for v in order]
        )
        got = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).state_dict()
        assert [k for k in want if not same_bits(got[k], want[k], Promise.SAME_PRODUCT)] == []
        assert report.variant == " + ".join(order)


@pytest.fixture
def place(tmp_path):
    """A base with two layers and a norm; its values are in `state`."""
    (tmp_path / "base").mkdir()
    state = {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8), "norm.weight": torch.randn(8)}
    save_file(state, tmp_path / "base" / "model.safetensors")
    return tmp_path, state


def _adapter(folder, name, module, others=None):
    others = others or {}
    write_adapter(folder / name, "bone", {module: torch.randn(4, 8)}, others=others, modules_to_save=["norm", "a", "b"])
    return folder / name


def test_a_value_moves_as_far_as_its_weight(place):
    folder, state = place
    value = torch.randn(8)
    one = _adapter(folder, "one", "a", {"norm.weight": value})
    for weight in (1.0, 0.25):
        merge_checkpoint(folder / "base", one, folder / str(weight), weights=[weight])
        got = load_file(folder / str(weight) / "model.safetensors")["norm.weight"]
        want = value if weight == 1 else state["norm.weight"] + weight * (value - state["norm.weight"])
        assert same_bits(got, want, Promise.SAME_PRODUCT)


def test_the_same_adapter_twice_is_one_of_twice_the_weight(place):
    folder, _ = place
    one = _adapter(folder, "one", "a")
    merge_checkpoint(folder / "base", [one, one], folder / "twice", weights=[0.5, 0.5])
    merge_checkpoint(folder / "base", one, folder / "once")
    got, want = (load_file(folder / n / "model.safetensors")["a.weight"] for n in ("twice", "once"))
    assert close(got, want)


def test_values_that_contradict_each_other_or_a_block_are_refused_by_name(place):
    folder, state = place
    value, other = torch.randn(8), torch.randn(8)
    one, two = (_adapter(folder, n, "a", {"norm.weight": v}) for n, v in (("one", value), ("two", other)))
    holds_b = _adapter(folder, "holds-b", "a", {"b.weight": torch.randn(8, 8)})
    shifts_b = _adapter(folder, "shifts-b", "b")
    before = listing(folder)
    with pytest.raises(FormatError, match=r"norm.weight: .*one and .*two hold values .* into the result"):
        merge_checkpoint(folder / "base", [one, two], folder / "out")
    with pytest.raises(FormatError, match=r"norm.weight: .* hold values for it that differ in value or weight"):
        merge_checkpoint(folder / "base", [one, one], folder / "out", weights=[1, 0.5])
    with pytest.raises(FormatError, match=r"b.weight: .*holds-b holds a value for it, and .*shifts-b a block"):
        merge_checkpoint(folder / "base", [holds_b, shifts_b], folder / "out")
    assert listing(folder) == before
    merge_checkpoint(folder / "base", [one, one], folder / "out")
    assert same_bits(load_file(folder / "out" / "model.safetensors")["norm.weight"], value, Promise.STORED)
    keeps_b = _adapter(folder, "keeps-b", "a", {"b.weight": state["b.weight"]})
    assert merge_checkpoint(folder / "base", [keeps_b, shifts_b], folder / "out2").merged == 2


def test_an_adapter_that_does_not_fit_is_named(place):
    folder, _ = place
    one = _adapter(folder, "one", "a")
    write_adapter(folder / "bad", "bone", {"a": torch.randn(4, 9), "b": torch.randn(4, 7)})
    with pytest.raises(FlashboneError, match=r"bad: .*a.weight.*b.weight"):
        merge_checkpoint(folder / "base", [one, folder / "bad"], folder / "out")


@pytest.mark.parametrize(
    ("adapters", "fields", "words"),
    [
        (0, {}, "adapters: got none"),
        (2, {"weights": [1.0]}, "weights: got 1 for 2 adapters"),
        (1, {"dtype": "int8"}, "dtype: got 'int8', wanted one of bf16"),
        (1, {"dtype": torch.float64}, "dtype: got 'torch.float64'"),
        (1, {"shard_size": "5XB"}, "shard size: got '5XB'"),
    ],
)
def test_invalid_arguments_are_refused(place, adapters, fields, words):
    folder, _ = place
    one = _adapter(folder, "one", "a")
    before = listing(folder)
    with pytest.raises(ConfigError, match=words):
        merge_checkpoint(folder / "base", [one] * adapters, folder / "out", **fields)
    assert listing(folder) == before


def test_a_lora_is_refused_with_the_way_out(place):
    folder, _ = place
    one = _adapter(folder, "one", "a")
    (one / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match=r"this is a LORA adapter, .*merge_and_unload"):
        merge_checkpoint(folder / "base", one, folder / "out")


@pytest.mark.parametrize("at_the_end", [True, False])
def test_weights_on_the_command_line(place, capsys, at_the_end):
    folder, _ = place
    paths = [str(folder / "base"), *(str(_adapter(folder, n, "a")) for n in ("one", "two")), str(folder / "out")]
    weights = ["--weights", "0.7", "-0.3"] if at_the_end else ["--weights=0.7,-0.3"]
    assert main(["merge", *paths, *weights] if at_the_end else ["merge", paths[0], *weights, *paths[1:]]) == 0
    assert "1 tensors merged (bone + bone)" in capsys.readouterr().out
    merge_checkpoint(paths[0], paths[1:3], folder / "want", weights=[0.7, -0.3])
    assert (folder / "out" / "model.safetensors").read_bytes() == (folder / "want" / "model.safetensors").read_bytes()


def test_weights_that_swallow_a_path_are_a_usage_error(place, capsys):
    folder, _ = place
    assert main(["merge", str(folder / "base"), "--weights", "0.7", "x", "y"]) == 2
    assert main(["merge", "base", "one", "out", "--weights", "0.7", "x"]) == 2
    assert "got 0.7 x, wanted numbers; put it last, or write --weights 0.7,0.3" in capsys.readouterr().err
