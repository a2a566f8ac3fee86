"""What inspecting an adapter reports, of files that PEFT, flashbone and RWKV-PEFT write."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, MissConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flashbone import BoneConfig
from flashbone.errors import FormatError
from flashbone.inspect.adapter import inspect_adapter
from flashbone.inspect.tables import print_report
from helpers.adapter_folders import blocks_for, tiny_bert, tiny_llama, write_adapter
from helpers.blocks import VARIANT_NAMES

GOLDEN = Path(__file__).parent.parent / "golden" / "peft-0.18.1"


def _saved(folder, config, make=tiny_llama) -> Path:
    model = get_peft_model(make(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 3
    model.save_pretrained(folder)
    return folder


def _verdicts(report) -> dict[str, str]:
    return {engine.name: engine.verdict for engine in report.engines}


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_an_adapter_of_each_variant_is_described(tmp_path, variant):
    folder = _saved(tmp_path, BoneConfig(r=4, mini_r=3, variant=variant, target_modules="all-linear"))
    report = inspect_adapter(folder)
    state = load_file(folder / "adapter_model.safetensors")
    assert (report.method, report.variant) == ("BONE", variant)
    assert f"variant {variant!r}" in report.evidence
    assert report.dtypes == {"float32": 14}
    assert (report.tensors, report.bytes) == (14, sum(t.nbytes for t in state.values()))
    assert report.file_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert (report.not_finite, report.untrained, report.others) == (0, 0, ())
    assert sum(group.count for group in report.blocks) == 14
    assert sum(group.parameters for group in report.blocks) == sum(t.numel() for t in state.values())
    assert {group.r for group in report.blocks} == {4}
    shapes = {group.modules: group.shapes for group in report.blocks}
    of_one = tuple(state["base_model.model.model.layers.0.self_attn.q_proj.bone_block"].shape)
    assert shapes["model.layers.{0..1}.self_attn.q_proj"] == (of_one,)


@pytest.mark.parametrize(("name", "variant"), [("bone", "bone"), ("bat", "bat-col"), ("bone-ragged", "bone")])
def test_files_of_peft_0_18_say_their_variant_by_init_weights(name, variant):
    report = inspect_adapter(GOLDEN / name)
    assert report.variant == variant
    assert report.layout == "PEFT folder, as PEFT 0.14 to 0.18 wrote it"
    assert "no variant, init_weights" in report.evidence


def test_a_weights_file_in_its_folder_is_that_folder(tmp_path):
    _saved(tmp_path, BoneConfig(r=4, target_modules=["q_proj"]))
    file = tmp_path / "adapter_model.safetensors"
    for one in (file, tmp_path / "adapter_config.json"):
        assert inspect_adapter(one).blocks == inspect_adapter(tmp_path).blocks
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"it has no adapter_config\.json"):
        inspect_adapter(file)


def test_biases_and_modules_to_save_are_listed_beside_the_blocks(tmp_path):
    config = BoneConfig(r=4, target_modules=["query"], bias="bone_only", task_type="SEQ_CLS")
    report = inspect_adapter(_saved(tmp_path, config, tiny_bert))
    assert {group.names: (group.count, group.parameters, group.shape) for group in report.others} == {
        "bert.encoder.layer.{0..1}.attention.self.query.bias": (2, 32, (16,)),
        "classifier.weight": (1, 32, (2, 16)),
        "classifier.bias": (1, 2, (2,)),
    }
    assert set(_verdicts(report).values()) == {"no"}
    assert report.base_model is None


def test_orthogonal_adapters_say_how_orthogonal_and_how_far_they_turn(tmp_path):
    angle = torch.tensor(0.3)
    P = torch.zeros(4, 4)
    P[0, 1] = torch.tan(angle / 2)  # A = P - P^T has eigenvalues +-i tan(a/2), and turns by a
    blocks = {f"layers.{i}.q": P * i for i in range(2)}
    report = inspect_adapter(write_adapter(tmp_path, "orthogonal", blocks))
    ((group),) = report.blocks
    assert group.modules == "layers.{0..1}.q"
    assert group.rotation_deg == pytest.approx(torch.rad2deg(angle).item(), rel=1e-5)
    a2 = float(P[0, 1]) ** 2  # Q^T Q - I in that plane, of the ridge 1e-6
    assert group.orthogonality_error == pytest.approx((1 + 1e-6) ** 2 * (1 + a2) / ((1 + 1e-6) ** 2 + a2) - 1, abs=3e-8)
    assert report.untrained == 1
    assert _verdicts(report)["vLLM"] == "approximate"


def test_values_that_are_not_finite_are_counted_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    blocks = blocks_for(tiny_llama(), "orthogonal", ("q_proj", "v_proj"), 4)
    name = "model.layers.{}.self_attn.{}".format
    whole = inspect_adapter(write_adapter(tmp_path / "whole", "orthogonal", blocks))
    blocks[name(1, "q_proj")][0, :2] = torch.tensor([float("nan"), float("inf")])
    for layer in range(2):
        blocks[name(layer, "v_proj")][2, 3] = float("-inf")
    report = inspect_adapter(write_adapter(tmp_path / "bad", "orthogonal", blocks))
    assert report.not_finite == 4
    bad = (name(1, "q_proj"), name(0, "v_proj"), name(1, "v_proj"))
    assert sorted(report.not_finite_in) == sorted(f"{module}.bone_block" for module in bad)

    groups = {group.modules.rpartition(".")[2]: group for group in report.blocks}
    assert (groups["v_proj"].orthogonality_error, groups["v_proj"].rotation_deg) == (None, None)  # no block of it turns
    (alone,) = inspect_adapter(
        write_adapter(tmp_path / "alone", "orthogonal", {name(0, "q_proj"): blocks[name(0, "q_proj")]})
    ).blocks
    assert groups["q_proj"].rotation_deg == alone.rotation_deg  # of the one that is finite
    assert groups["q_proj"].orthogonality_error == alone.orthogonality_error

    print_report(report)
    text = capsys.readouterr().out
    assert "4 values are NaN or infinite" in text
    assert re.search(r"v_proj x 2 .* \? +\? *\n", text)
    assert f"{alone.rotation_deg:.1f} deg" in text
    print_report(whole)
    assert "?" not in capsys.readouterr().out


def test_an_adapter_as_it_started_is_untrained(tmp_path):
    get_peft_model(tiny_llama(), BoneConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).untrained == 2
    get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).untrained == 2


@pytest.mark.parametrize(
    ("init_weights", "variant"), [(True, "bone"), ("bat", "bat-col"), ("mini", "mini"), (False, "bone")]
)
def test_miss_is_recognised_with_the_variant_that_it_is(tmp_path, init_weights, variant):
    config = MissConfig(r=4, mini_r=2, init_weights=init_weights, target_modules=["q_proj", "down_proj"])
    report = inspect_adapter(_saved(tmp_path, config))
    assert (report.method, report.variant) == ("MISS", variant)
    assert {group.r for group in report.blocks} == {4}
    assert f"init_weights {init_weights!r}" in report.evidence


def test_lora_and_dora_are_recognised(tmp_path):
    report = inspect_adapter(_saved(tmp_path / "lora", LoraConfig(r=3, target_modules=["q_proj"])))
    assert (report.method, report.variant) == ("LORA", None)
    assert [(g.r, g.shapes) for g in report.blocks] == [(3, ((3, 20), (20, 3)))]
    assert set(_verdicts(report).values()) == {"exact"}
    report = inspect_adapter(_saved(tmp_path / "dora", LoraConfig(r=3, use_dora=True, target_modules=["q_proj"])))
    assert set(_verdicts(report).values()) == {"no"}


@pytest.mark.parametrize(
    ("r", "verdict", "how"),
    [
        (1, "exact", "of rank 1"),
        (6, "exact", "of rank 8, padded with zeros"),
        (64, "exact", "of rank 64"),
        (65, "exact", "of rank 128, padded with zeros"),
        (300, "exact", "of rank 320, padded with zeros"),
        (512, "exact", "of rank 512"),
        (513, "no", "rank 513 is more than its 512; merge it"),
    ],
)
def test_vllm_takes_some_ranks_only(tmp_path, r, verdict, how):
    report = inspect_adapter(write_adapter(tmp_path, "bone", {"q": torch.randn(r, 8)}, r=r))
    (vllm,) = (engine for engine in report.engines if engine.name == "vLLM")
    assert vllm.verdict == verdict
    assert vllm.how.endswith(how)
    assert _verdicts(report)["llama.cpp"] == "exact"


def _rwkv(suffix: str, axes: int, r: int = 4, width: int = 8) -> dict[str, torch.Tensor]:
    state = {}
    for layer in range(2):
        for name, (out, in_) in {"att.key": (width, width), "ffn.key": (4 * width, width)}.items():
            shape = (r, out) if axes == 2 else (in_ // r, r, r)
            state[f"blocks.{layer}.{name}.{suffix}"] = torch.randn(shape, dtype=torch.bfloat16)
    return state


@pytest.mark.parametrize("suffix", ["disha", "bone"])
def test_bone_of_rwkv_peft_is_told_by_its_two_axes(tmp_path, suffix):
    extra = {f"blocks.{layer}.ln1.weight": torch.ones(8) for layer in range(2)} | {"ln_out.bias": torch.ones(8)}
    torch.save(_rwkv(suffix, 2) | extra, tmp_path / "rwkv-0.pth")
    report = inspect_adapter(tmp_path / "rwkv-0.pth")
    assert (report.method, report.variant) == ("BONE", "bone")
    assert report.layout == f"RWKV-PEFT, keys end in .{suffix}"
    assert [(g.modules, g.r, g.shapes) for g in report.blocks] == [
        ("blocks.{0..1}.att.key", 4, ((4, 8),)),
        ("blocks.{0..1}.ffn.key", 4, ((4, 32),)),
    ]
    assert [(g.names, g.count) for g in report.others] == [("blocks.{0..1}.ln1.weight", 2), ("ln_out.bias", 1)]
    assert report.dtypes == {"bfloat16": 4, "float32": 3}
    assert report.engines == ()


def test_three_axes_under_disha_are_bat_row(tmp_path):
    torch.save(_rwkv("disha", 3), tmp_path / "adapter.pth")
    for given in (tmp_path / "adapter.pth", tmp_path):  # as a file, and as the folder that conversion writes
        report = inspect_adapter(given)
        assert report.variant == "bat-row"
        assert "mode bat, n = in / r" in report.evidence


def test_which_bat_an_old_file_of_rwkv_peft_holds_is_not_guessed(tmp_path):
    save_file(_rwkv("bone", 3), tmp_path / "adapter.safetensors")
    report = inspect_adapter(tmp_path / "adapter.safetensors")
    assert report.variant is None
    assert "the file does not tell them apart" in report.evidence
    assert {group.r for group in report.blocks} == {4}


def test_old_pickles_that_are_no_zip_are_read_too(tmp_path):
    torch.save(_rwkv("bone", 2), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert inspect_adapter(tmp_path / "old.pth").variant == "bone"


class _Code:
    def __reduce__(self):
        return print, ("pickled code ran",)


def _write_truncated(folder):
    torch.save(_rwkv("disha", 2), folder / "x.pth")
    data = (folder / "x.pth").read_bytes()
    (folder / "x.pth").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: (f / "x.pth").write_bytes(b"junk"), "x.pth: (refused|cannot be read|not a whole torch file)"),
        (_write_truncated, "x.pth: not a whole torch file"),
        (
            lambda f: torch.save({"a": _Code()}, f / "x.pth"),
            "refused, its pickle asks for",
        ),
        (lambda f: torch.save([torch.ones(2)], f / "x.pth"), "wanted a dict of tensors by name"),
        (lambda f: torch.save({}, f / "x.pth"), "none of its 0 tensors"),
        (lambda f: torch.save({"emb.weight": torch.ones(2)}, f / "x.pth"), r"names are like 'emb.weight'"),
        (
            lambda f: torch.save({"q.disha": torch.ones(2, 2), "w": torch.ones(1)}, f / "x.pth"),
            "q.disha: not a name of an RWKV model; w: not a name",
        ),
        (
            lambda f: torch.save({"head.disha": torch.ones(2, 3, 4), "emb.bone": torch.ones(2, 2)}, f / "x.pth"),
            r"head.disha: got shape \(2, 3, 4\).*it mixes keys that end in bone and disha",
        ),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, write, message, capsys):
    write(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        inspect_adapter(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert "pickled code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_models_weights_are_said_to_be_that(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"not to be read")
    with pytest.raises(FormatError, match=f"holds a model's weights; for the model, give its folder, {tmp_path}$"):
        inspect_adapter(tmp_path / name)


def test_a_folder_that_is_no_adapter_is_one_clear_line(tmp_path):
    with pytest.raises(FormatError, match=r"it has no adapter_config\.json"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(FormatError, match="this is a IA3 adapter"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match="this adapter has no weights"):
        inspect_adapter(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="sets peft_type LORA, but no tensor is one of that method"):
        inspect_adapter(tmp_path)


def test_the_base_model_is_told_where_the_file_says_it(tmp_path):
    folder = write_adapter(tmp_path, "bone", {"q": torch.randn(4, 8)}, base_model_name_or_path="somebody/base")
    assert inspect_adapter(folder).base_model == "somebody/base"
