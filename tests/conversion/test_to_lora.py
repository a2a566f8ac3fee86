"""Adapters as plain LoRAs: what PEFT loads from our folder computes what the adapter does."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from flashbone import convert
from flashbone.cli import main
from flashbone.errors import ConfigError, FormatError, NonFiniteError, ShapeError
from flashbone.files import lora, peft, tensors
from flashbone.files.base import open_base
from flashbone.files.placing import place
from helpers.adapter_folders import blocks_for, listing, tiny_bert, tiny_gpt2, tiny_llama, write_adapter
from helpers.comparison import Promise, close, same_bits

IDS = torch.arange(2, 12).view(2, 5)
EXACT, APPROXIMATE = ("bone", "mini"), ("bat-col", "bat-row", "orthogonal")
LLAMA = ["q_proj", "v_proj", "down_proj"]
TARGETS = {tiny_llama: LLAMA, tiny_gpt2: ["c_attn", "c_proj"], tiny_bert: ["query", "output.dense"]}


def trained(place: Path, model: nn.Module, **fields) -> tuple[nn.Module, torch.Tensor]:
    """Saves `base` and a random `adapter` with PEFT; the bare model, and the adapted one's logits."""
    model.save_pretrained(place / "base")
    bare = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied embeddings, and that PEFT saves embeddings along
        adapted = get_peft_model(model, BoneConfig(**{"r": 6, "mini_r": 4, "init_weights": False} | fields)).eval()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "bone_block" not in name:
                parameter.data += torch.randn_like(parameter) / 2
        adapted.save_pretrained(place / "adapter")
    with torch.no_grad():
        return bare, adapted(IDS).logits


def with_lora(bare: nn.Module, folder: Path) -> torch.Tensor:
    """Logits with the folder as PEFT loads it, all of its tensors used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = PeftModel.from_pretrained(bare, folder).eval()
    used = {key for name in model.state_dict() for key in (name, name.replace(".default", ""))}
    used |= {key.replace(".modules_to_save", "") for key in used}
    assert set(load_file(folder / "adapter_model.safetensors")) <= used
    with torch.no_grad():
        return model(IDS).logits


def refused(place: Path, *words: str, kind=FormatError, **options) -> None:
    before = listing(place)
    with pytest.raises(kind) as caught:
        convert(place / "adapter", place / "out", "lora", **{"base": place / "base"} | options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert listing(place) == before


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("maker", TARGETS)
def test_bone_and_mini_are_loras_to_rounding_in_use(tmp_path, maker, variant):
    bare, want = trained(tmp_path, maker(), variant=variant, target_modules=TARGETS[maker])
    report = convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base")
    assert (report.exact, report.rank, report.errors) == (True, 6, ())
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
    assert not close(bare(IDS).logits, want)
    assert close(with_lora(bare, tmp_path / "out"), want)


@pytest.mark.parametrize(("rank", "wanted"), [(None, 24), (32, 32)])
def test_blocks_of_several_sizes_become_one_rank_with_zeros(tmp_path, rank, wanted):
    pattern = {"v_proj": 24, "layers.1.self_attn.q_proj": 2}  # 24 is more than the 20 input features
    bare, want = trained(tmp_path, tiny_llama(), target_modules=LLAMA, rank_pattern=pattern)
    report = convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base", rank=rank)
    assert (report.rank, report.exact) == (wanted, True)
    shapes = {t.shape[0] for k, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if "lora_A" in k}
    assert shapes == {wanted}
    assert close(with_lora(bare, tmp_path / "out"), want)


@pytest.mark.parametrize("bias", ["none", "bone_only", "all"])
def test_biases_and_modules_to_save_come_along(tmp_path, bias):
    fields = {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    bare, want = trained(tmp_path, tiny_bert(), bias=bias, **fields)
    report = convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base")
    assert report.replaced >= 2
    assert close(with_lora(bare, tmp_path / "out"), want)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_becomes_an_embedding_of_lora(tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    bare, want = trained(tmp_path, model, target_modules=["embed_tokens", "q_proj"])
    convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base")
    read = lora.read(tmp_path / "out")
    assert read.embeddings == {"model.embed_tokens"}
    assert read.factors["model.embed_tokens"][0].shape == (6, 50)
    assert close(with_lora(bare, tmp_path / "out"), want)


@pytest.mark.parametrize("maker", TARGETS)
@pytest.mark.parametrize("variant", APPROXIMATE)
def test_an_svd_of_full_rank_is_the_adapter(tmp_path, variant, maker):
    bare, want = trained(tmp_path, maker(), variant=variant, target_modules=TARGETS[maker])
    report = convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base", rank=30)
    assert report.rank == 30
    assert max(e.error for e in report.errors) < 1e-6
    assert close(with_lora(bare, tmp_path / "out"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maker", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("variant", APPROXIMATE)
def test_an_svd_meets_the_error_on_every_weight_with_no_rank_to_spare(tmp_path, variant, maker, dtype):
    model = maker().to(dtype)
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", variant, blocks_for(model, variant, ("q_proj", "c_attn", "c_proj"), 4))
    report = convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base", error=0.2)
    assert [e.error for e in report.errors] == sorted((e.error for e in report.errors), reverse=True)
    got = lora.read(tmp_path / "out")
    base, adapter = open_base(tmp_path / "base"), peft.read(tmp_path / "adapter")
    found = {e.name: e for e in report.errors}
    for here in place(base, adapter):
        entry = base.entries[here.tensor]
        with base.files[0].path.open("rb") as file:
            file.seek(entry.start)
            W = tensors.read(file, entry).double()
        D = adapter.variant.delta(W.mT if here.transposed else W, here.block.double())
        A, B = (t.double() for t in got.factors[here.name])
        S, own = torch.linalg.svdvals(D), found[here.name]
        assert float((D - B @ A).norm() / D.norm()) == pytest.approx(own.error, rel=1e-4)
        assert own.error <= 0.2 < float(S[own.rank - 1 :].norm() / S.norm())
        assert not A[own.rank :].any()
        assert not B[:, own.rank :].any()
    assert report.rank == got.rank == max(e.rank for e in report.errors)


def test_fewer_ranks_than_a_block_has_are_an_svd_of_it(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", blocks_for(model, "bone", ("q_proj",), 4))
    report = convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base", rank=2)
    assert (report.exact, report.rank) == (False, 2)
    assert all(0.01 < e.error < 1 and e.rank == 2 for e in report.errors)


def test_an_untrained_adapter_is_a_lora_of_rank_one_that_adds_nothing(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bat-col", blocks_for(model, "bat-col", ("q_proj",), 4, std=0))
    report = convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base", error=0.01)
    assert report.rank == 1
    assert {(e.rank, e.error) for e in report.errors} == {(0, 0.0)}
    assert same_bits(with_lora(copy.deepcopy(model), tmp_path / "out"), model(IDS).logits, Promise.EXACT)


def test_target_modules_are_the_shortest_endings_that_mean_no_other_layer(tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    blocks = blocks_for(model, "bone", ("dense",), 4)
    kept = {name: b for name, b in blocks.items() if name.endswith((".output.dense", "layer.1.intermediate.dense"))}
    write_adapter(tmp_path / "adapter", "bone", {n: b for n, b in kept.items() if "attention" not in n})
    convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base")
    got = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert got == ["0.output.dense", "1.intermediate.dense", "1.output.dense"]
    live = PeftModel.from_pretrained(model, tmp_path / "out")
    adapted = {name.partition(".lora_A")[0] for name in live.state_dict() if "lora_A" in name}
    assert adapted == {f"base_model.model.{n}" for n in kept if "attention" not in n}


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_a_base_of_another_head_is_found_under_its_own_names(tmp_path, prefix):
    classifier = tiny_bert()
    (classifier if prefix else classifier.bert).save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bone", blocks_for(classifier, "bone", ("query",), 4))
    convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"] == ["query"]
    assert all(name.startswith("bert.encoder") for name in lora.read(tmp_path / "out").factors)


@pytest.mark.parametrize("variant", APPROXIMATE)
def test_a_variant_without_factors_asks_for_a_rank_or_an_error(tmp_path, variant):
    trained(tmp_path, tiny_llama(), variant=variant, target_modules=LLAMA)
    refused(tmp_path, "down_proj", variant, "give the rank", "r here is 6", "or the error", kind=ConfigError)
    refused(tmp_path, "got a rank and an error", kind=ConfigError, rank=4, error=0.1)


def test_a_base_that_does_not_belong_to_the_adapter_is_refused(tmp_path):
    trained(tmp_path, tiny_llama(), target_modules=LLAMA)
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    refused(tmp_path, "q_proj", "not in the base", base=tmp_path / "gpt2")
    write_adapter(tmp_path / "adapter", "bone", {"model.layers.0.self_attn.q_proj": torch.randn(4, 21)})
    refused(tmp_path, "does not fit a layer with 20 output", kind=ShapeError)


def test_a_broken_adapter_is_refused_by_the_name_of_its_layer(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    name = "model.layers.1.self_attn.q_proj"
    write_adapter(tmp_path / "adapter", "bone", {name: torch.full((4, 20), torch.nan)})
    refused(tmp_path, name, "NaN", kind=NonFiniteError)


class Mixture(nn.Module):
    """A convolution, a stack of experts, an attention and a vector that is trained by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.experts = nn.Conv1d(3, 4, 2), nn.ParameterDict({"up": torch.randn(2, 4, 3)})
        self.attn, self.gate = nn.MultiheadAttention(4, 1), nn.Parameter(torch.randn(4))


def test_what_a_lora_has_no_place_for_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    model = Mixture()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    blocks = {"conv": torch.randn(4, 4), "experts.up": torch.randn(2, 4, 4), "attn.out_proj": torch.randn(4, 4)}
    fields = {"target_parameters": ["experts.up"], "modules_to_save": ["attn"]}
    others = {"attn.in_proj_weight": torch.randn(12, 4)}
    write_adapter(tmp_path / "adapter", "bone", blocks, others=others, **fields)
    refused(tmp_path, "conv, a convolution", "experts.up, a parameter", "attn.out_proj, whose weight", "merge")


def test_a_weight_that_an_adapter_replaces_and_shifts_is_the_new_one(tmp_path):
    """PEFT saves the table of a targeted embedding along: the delta belongs to that, and so does the LoRA."""
    model = tiny_llama(tie_word_embeddings=False)
    bare, want = trained(tmp_path, model, target_modules=["embed_tokens"])
    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in state
    convert(tmp_path / "adapter", tmp_path / "out", "lora", base=tmp_path / "base")
    assert "model.embed_tokens.weight" in lora.read(tmp_path / "out").replacements
    bare.get_input_embeddings().weight.data.zero_()
    assert close(with_lora(bare, tmp_path / "out"), want)


def test_the_command_reports_each_modules_error_the_worst_first(tmp_path, capsys):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", "bat-row", blocks_for(model, "bat-row", ("q_proj", "k_proj"), 4))
    options = [str(tmp_path / "adapter"), "--to", "lora", "--base", str(tmp_path / "base")]
    assert main(["convert", *options, str(tmp_path / "a"), "--rank", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    errors = [module["error"] for module in report["errors"]]
    assert (report["rank"], report["exact"], len(errors)) == (3, False, 4)
    assert errors == sorted(errors, reverse=True)
    assert main(["convert", *options, str(tmp_path / "b"), "--rank", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("4 modules, bat-row to lora, rank 3, approximate")
    assert lines[2].split() == [f"{errors[0]:.2e}", "rank", "3", report["errors"][0]["name"]]
    assert main(["convert", *options, str(tmp_path / "c")]) == 1
    assert "give the rank of the LoRA" in capsys.readouterr().err


def _plain_lora(folder: Path, base: torch.nn.Module, rows: int = 0) -> Path:
    """A LoRA with free factors on one layer; `rows` more outputs than the base has."""
    out, in_ = base.model.layers[0].self_attn.q_proj.weight.shape
    state = {"lora_A": torch.randn(4, in_), "lora_B": torch.randn(out + rows, 4)}
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{name}.{key}.weight": tensor for key, tensor in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return folder


@pytest.mark.parametrize("target", ["lora", "gguf"])
def test_a_lora_of_another_model_is_refused(tmp_path, target):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    wrong = _plain_lora(tmp_path / "wrong", base, rows=2)
    with pytest.raises(ShapeError, match=r"q_proj: factors for 22 x 20, the base has 20 x 20"):
        convert(wrong, tmp_path / "out", target, base=tmp_path / "base")
    assert convert(_plain_lora(tmp_path / "right", base), tmp_path / "out", target, base=tmp_path / "base").exact


def test_a_lora_that_holds_nan_is_refused(tmp_path):
    base = tiny_llama()
    folder = _plain_lora(tmp_path / "lora", base)
    state = load_file(folder / "adapter_model.safetensors")
    save_file({k: t * torch.nan for k, t in state.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match="q_proj hold NaN or infinity"):
        convert(folder, tmp_path / "out", "lora")
