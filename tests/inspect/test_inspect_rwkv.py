"""What inspecting RWKV-7 and RWKV-6 reports: their `.pth` files, folders, and adapters; which file is which."""

import dataclasses
import json

import pytest
import torch
from peft import get_peft_model
from test_inspect_costs import bytes_kept
from torch import nn

from flashbone import BoneConfig
from flashbone.cli import main
from flashbone.errors import FormatError
from flashbone.inspect.adapter import inspect_adapter
from flashbone.inspect.model import inspect_model
from flashbone.rwkv import from_pth, to_pth
from helpers.blocks import VARIANT_NAMES
from helpers.rwkv import write_rwkv

pytestmark = pytest.mark.slow

SINGLE = {7: ["att.x_r", "att.w2"], 6: ["time_decay", "time_maa_w2"]}
KINDS = {7: 6, 6: 8}  # kinds of projections in a block


@pytest.fixture(params=[7, 6])
def version(request):
    return request.param


@pytest.fixture
def base(tmp_path, version):
    return write_rwkv(tmp_path / "base.pth", version)


def _fields(version: int, variant: str = "bone") -> dict:
    more = {"modules_to_save": ["ln1", "ln_x"], "parameters_to_save": SINGLE[version]}
    return {"variant": variant, "r": 6, "mini_r": 2, **more}


def test_parameters_file_and_memory_are_those_of_a_real_adapter(tmp_path, base, version):
    report = inspect_model(base, _fields(version), dtype=torch.float32)
    model = from_pth(base)
    assert report.architecture == f"Rwkv{version}ForCausalLM"
    assert report.parameters == sum(t.numel() for t in torch.load(base, weights_only=True).values())
    assert report.base_bytes == 4 * report.parameters
    assert report.assumption == ""
    assert report.linear_multiply_adds == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    adapted = get_peft_model(model, BoneConfig(target_modules="all-linear", **_fields(version)))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    costs = report.costs
    assert costs.trainable_parameters == adapted.get_nb_trainable_parameters()[0]
    assert costs.file_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert costs.weight_bytes == sum(p.nbytes for p in adapted.parameters()) - report.base_bytes
    assert [group.layers for group in report.layers] == [3] * KINDS[version]
    assert not any("head" in group.modules for group in report.layers)
    assert sum(group.trainable_parameters for group in (*report.layers, *report.others)) == costs.trainable_parameters


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_exactly_what_is_reported_is_kept_for_backward(base, variant):
    fields = {"variant": variant, "r": 6, "mini_r": 2}
    report = inspect_model(base, fields, tokens=24, dtype=torch.float32)
    model = from_pth(base).train().requires_grad_(False)
    model.enable_input_require_grads()
    ids = torch.arange(24).view(2, 12)
    frozen = bytes_kept(model, input_ids=ids)
    adapted = get_peft_model(model, BoneConfig(target_modules="all-linear", **fields))
    assert bytes_kept(adapted, input_ids=ids) - frozen == report.costs.activation_bytes > 0


def test_a_folder_of_the_model_costs_what_its_file_does(tmp_path, base, version):
    from_pth(base).save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"not to be read")
    reports = [inspect_model(path, _fields(version)) for path in (base, tmp_path / "folder")]
    file, folder = (dataclasses.replace(report, model="") for report in reports)
    assert file == folder


def test_of_a_large_file_only_names_and_shapes_are_read(tmp_path, version):
    """Its numbers are NaN."""
    model = from_pth(write_rwkv(tmp_path / "base.pth", version, hidden=64, vocabulary=20_000))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    to_pth(model, tmp_path / "broken.pth")
    assert inspect_model(tmp_path / "broken.pth").costs.method == "bone"


def _saved(folder, base, version):
    fields = {"target_modules": ["att.key", "ffn.value"], **_fields(version)}
    model = get_peft_model(from_pth(base), BoneConfig(**fields))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def test_adapters_of_both_layouts_are_described_alike(tmp_path, base, version):
    folder = _saved(tmp_path, base, version)
    assert main(["convert", str(folder), str(tmp_path / "a.pth"), "--to", "rwkv-peft"]) == 0
    assert main(["convert", str(folder), str(tmp_path / "held"), "--to", "rwkv-peft"]) == 0
    ours, theirs, held = (inspect_adapter(tmp_path / name) for name in ("adapter", "a.pth", "held"))
    assert ours.base_model == str(base)
    for report in (ours, theirs, held):
        assert (report.method, report.variant, report.engines) == ("BONE", "bone", ())
        assert {group.modules for group in report.blocks} == {"blocks.{0..2}.att.key", "blocks.{0..2}.ffn.value"}
        names = {group.names for group in report.others}
        assert names == {group.names for group in ours.others}
        assert {"blocks.{0..2}.att.ln_x.bias", f"blocks.{{0..2}}.att.{SINGLE[version][0].rpartition('.')[2]}"} <= names


def test_the_command_tells_models_from_adapters(tmp_path, base, version, capsys):
    folder = _saved(tmp_path, base, version)
    for out in ("a.pth", "held"):
        assert main(["convert", str(folder), str(tmp_path / out), "--to", "rwkv-peft"]) == 0
    capsys.readouterr()
    for adapter in ("adapter", "a.pth", "held"):
        assert main(["inspect", str(tmp_path / adapter), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["method"] == "BONE"
    assert main(["inspect", str(base), "--adapter.r", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == f"Rwkv{version}ForCausalLM"
    assert main(["inspect", str(base), "--adapter.r", "4"]) == 0
    assert "blocks.{0..2}.att.receptance x 3" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "a.pth"), "--adapter.r", "4"]) == 1
    assert "a.pth: is an adapter; --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["emb.weight", "blocks.0.att.time_mix_g"], "is an RWKV-5 model; RWKV-6 and RWKV-7 can be loaded"),
        (["emb.weight", "blocks.0.att.time_mix_k"], "is an RWKV-4 or 5 model"),
        (["x.weight"], "no adapter of RWKV-PEFT, none of its 1 tensors ends in .disha or .bone"),
    ],
)
def test_other_files_are_refused_for_what_they_are(tmp_path, capsys, names, message):
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "x.pth")
    assert main(["inspect", str(tmp_path / "x.pth")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"flashbone inspect: error: {tmp_path / 'x.pth'}: {message}")
    assert captured.err.count("\n") == 1


def test_one_in_the_place_of_the_other_is_called_by_its_name(tmp_path, base, version, capsys):
    adapter = tmp_path / "a.pth"
    assert main(["convert", str(_saved(tmp_path, base, version)), str(adapter), "--to", "rwkv-peft"]) == 0
    with pytest.raises(FormatError, match=r"a\.pth: is an adapter of RWKV-PEFT, wanted a model"):
        inspect_model(adapter)
    with pytest.raises(FormatError, match=r"base\.pth: is a whole RWKV model, wanted an adapter"):
        inspect_adapter(base)
    for command, message in (
        (["merge", str(adapter), str(base)], "a.pth: is an adapter of RWKV-PEFT, wanted the model here; the order is"),
        (["merge", str(base), str(base)], "base.pth: is a whole RWKV model, wanted an adapter"),
        (["convert", str(base)], "base.pth: is a whole RWKV model, wanted an adapter"),
    ):
        more = ["--to", "peft"] if command[0] == "convert" else []
        assert main([*command, str(tmp_path / "out.pth"), *more]) == 1
        assert message in capsys.readouterr().err
