"""Verification of merges into RWKV-7 and RWKV-6 models: `.pth` files, and folders that transformers wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashbone import BoneConfig, merge_checkpoint, variants
from flashbone.cli import main
from flashbone.errors import ConfigError, FormatError
from flashbone.merge.verify import LIMIT, check_verifiable, compare_logits
from flashbone.rwkv import from_pth
from helpers.adapter_folders import listing, write_adapter
from helpers.blocks import VARIANT_NAMES
from helpers.rwkv import write_rwkv

pytestmark = pytest.mark.slow

TARGETS = ("att.receptance", "att.key", "att.output", "ffn.key", "ffn.value")
SINGLE = {7: ("att.x_k", "att.w0", "att.a2", "att.r_k"), 6: ("att.time_decay", "att.time_maa_w2", "ffn.time_maa_k")}
NORMS = ("ln1", "att.ln_x", "ln_out")


def load(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return load_file(path / "model.safetensors")
    return {name: t.clone() for name, t in torch.load(path, weights_only=True).items()}


def save(state: dict[str, Tensor], path: Path) -> None:
    if path.is_dir():
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, path)


def base_file(place: Path, version: int, dtype: torch.dtype = torch.float32) -> Path:
    path = write_rwkv(place / "base.pth", version, layers=2)
    save({name: t.to(dtype) for name, t in load(path).items()}, path)
    return path


def block_of(W: Tensor, variant: str, r: int = 4) -> Tensor:
    """A block whose delta is 3% of the weight, as those of trained ones are."""
    block = torch.randn(variants.get(variant).block_shape(*W.shape, r, 2)) / 100
    return block * 0.03 * W.float().norm() / variants.get(variant).delta(W.float(), block).norm()


def blocks_of(state: dict[str, Tensor], variant: str, targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
    names = [name.removesuffix(".weight") for name in state]
    return {name: block_of(state[f"{name}.weight"], variant) for name in names if name.endswith(targets)}


def values_of(state: dict[str, Tensor], version: int) -> dict[str, Tensor]:
    """Trained LayerNorms and single parameters of every layer."""
    ends = (*(f".{norm}.{leaf}" for norm in NORMS for leaf in ("weight", "bias")), *SINGLE[version])
    return {n: t.float() + torch.randn(t.shape) / 30 for n, t in state.items() if f".{n}".endswith(ends)}


def rwkv_peft_file(path: Path, state: dict[str, Tensor], version: int, mode: str, suffix: str, lead: str = "") -> Path:
    """A file as RWKV-PEFT writes it, in bf16."""
    held = {f"{n}.{suffix}": block for n, block in blocks_of(state, {"bone": "bone", "bat": "bat-row"}[mode]).items()}
    held |= values_of(state, version)
    torch.save({lead + name: t.bfloat16() for name, t in held.items()}, path)
    return path


def live_folder(place: Path, base: Path, version: int, variant: str) -> Path:
    """The folder of an adapter on the live model, as after training."""
    model = get_peft_model(
        from_pth(base),
        BoneConfig(
            variant=variant,
            r=4,
            mini_r=2,
            target_modules=list(TARGETS),
            modules_to_save=list(NORMS),
            parameters_to_save=list(SINGLE[version]),
        ),
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "bone_block" not in name:
            parameter.data += torch.randn_like(parameter) / 30
    for name, block in blocks_of(load(base), variant).items():
        model.base_model.model.get_submodule(name).bone_block["default"].data = block
    model.save_pretrained(place / "adapter", save_embedding_layers=False)  # a file has no config that says
    return place / "adapter"


def assert_only_the_right_merge_passes(base: Path, adapters: list[Path], out: Path, weights=None) -> None:
    """Also with one tensor of each kind left as the base has it: a projection, a norm, a single parameter."""
    right = compare_logits(base, adapters, weights, out)
    assert right.ok
    assert right.unexplained < LIMIT / 3
    merged, state = load(out), load(base)
    changed = [name for name, t in merged.items() if "blocks.1." in name and not t.equal(state[name])]
    norms = [name for name in changed if ".ln" in name]
    projections = [name for name in changed if name.endswith(".weight") and name not in norms]
    singles = [name for name in changed if name not in (*norms, *projections)]
    for name in (projections[-1], norms[-1], singles[-1]):
        save(merged | {name: state[name]}, out)
        assert not compare_logits(base, adapters, weights, out).ok, name
    save(merged, out)


CASES = [
    (7, "bone", torch.float32),
    (7, "bat", torch.bfloat16),
    (6, "bone", torch.bfloat16),
    (6, "bat", torch.float32),
]


@pytest.mark.parametrize(("version", "mode", "dtype"), CASES, ids=str)
def test_a_file_of_rwkv_peft_with_norms_and_single_values_passes_and_fails(tmp_path, version, mode, dtype):
    base = base_file(tmp_path, version, dtype)
    adapter = rwkv_peft_file(tmp_path / "rwkv-0.pth", load(base), version, mode, "disha")
    merge_checkpoint(base, adapter, tmp_path / "out.pth")
    assert_only_the_right_merge_passes(base, [adapter], tmp_path / "out.pth")


@pytest.mark.parametrize(("version", "weight"), [(7, 1.0), (6, -0.4)])
def test_an_adapter_of_the_live_model_passes_and_fails(tmp_path, version, weight):
    base = base_file(tmp_path, version)
    adapter = live_folder(tmp_path, base, version, "bone")
    merge_checkpoint(base, adapter, tmp_path / "out.pth", weights=[weight])
    assert_only_the_right_merge_passes(base, [adapter], tmp_path / "out.pth", [weight])
    assert not compare_logits(base, [adapter], [weight + 0.1], tmp_path / "out.pth").ok


@pytest.mark.parametrize(("variant", "version"), [*zip(VARIANT_NAMES, (7, 6, 7, 6, 7), strict=True)])
def test_every_variant_passes(tmp_path, variant, version):
    base = base_file(tmp_path, version, torch.bfloat16)
    adapter = live_folder(tmp_path, base, version, variant)
    merge_checkpoint(base, adapter, tmp_path / "out.pth")
    verification = compare_logits(base, [adapter], None, tmp_path / "out.pth")
    assert verification.ok
    assert verification.dtype == "bfloat16"
    assert verification.rounding > 10 * LIMIT


def test_old_keys_and_a_leading_part_of_all_names_pass(tmp_path):
    base = base_file(tmp_path, 7)
    adapter = rwkv_peft_file(tmp_path / "rwkv-0.pth", load(base), 7, "bone", "bone", lead="model.")
    merge_checkpoint(base, adapter, tmp_path / "out.pth")
    assert compare_logits(base, [adapter], None, tmp_path / "out.pth").ok


def test_several_adapters_with_weights_pass_and_wrong_ones_fail(tmp_path):
    base = base_file(tmp_path, 7)
    one, two = tmp_path / "one", tmp_path / "two"
    write_adapter(one, "bone", blocks_of(load(base), "bone", TARGETS[:3]), target_modules=list(TARGETS[:3]))
    write_adapter(two, "bat-col", blocks_of(load(base), "bat-col", TARGETS[2:]), target_modules=list(TARGETS[2:]))
    merge_checkpoint(base, [one, two], tmp_path / "out.pth", weights=[0.7, -0.3])
    assert compare_logits(base, [two, one], [-0.3, 0.7], tmp_path / "out.pth").ok
    for weights in ([0.7, -0.35], [0.7, 0.3], None):
        assert not compare_logits(base, [one, two], weights, tmp_path / "out.pth").ok


@pytest.mark.parametrize("flat", ["base", "adapter"])
def test_vectors_that_one_file_holds_without_axes_of_one_are_the_same_vectors(tmp_path, flat):
    base = base_file(tmp_path, 7)
    adapter = rwkv_peft_file(tmp_path / "rwkv-0.pth", load(base), 7, "bone", "disha")
    file = {"base": base, "adapter": adapter}[flat]
    save({name: t.flatten() if t.shape[:2] == (1, 1) else t for name, t in load(file).items()}, file)
    merge_checkpoint(base, adapter, tmp_path / "out.pth", weights=[0.5])
    assert {n: t.shape for n, t in load(tmp_path / "out.pth").items()} == {n: t.shape for n, t in load(base).items()}
    assert_only_the_right_merge_passes(base, [adapter], tmp_path / "out.pth", [0.5])


@pytest.mark.parametrize("version", [7, 6])
def test_folders_of_the_models_are_verified_and_merged(tmp_path, version):
    base = tmp_path / "base"
    from_pth(base_file(tmp_path, version)).save_pretrained(base)
    adapter = rwkv_peft_file(tmp_path / "rwkv-0.pth", load(base), version, "bone", "disha")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_only_the_right_merge_passes(base, [adapter], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == f"rwkv_x0{version}0"


@pytest.mark.slow
def test_a_model_that_amplifies_fp32_errors_beyond_the_limit_passes_and_fails(tmp_path, monkeypatch):
    """Twelve layers of large random numbers, with heads whose output nearly vanishes: 2e-5 in fp32, 3e-7 in fp64."""
    base = write_rwkv(tmp_path / "base.pth", 7, hidden=192, head=16, layers=12, vocabulary=1000)
    adapter = rwkv_peft_file(tmp_path / "rwkv-0.pth", load(base), 7, "bone", "disha")
    out = tmp_path / "out.pth"
    merge_checkpoint(base, adapter, out, dtype="bf16")
    monkeypatch.setattr("flashbone.merge.verify.LIMIT", 4e-6)
    with monkeypatch.context() as patched:
        patched.setattr("flashbone.merge.verify.models.amplifies_rounding", lambda path: False)
        in_fp32 = compare_logits(base, [adapter], None, out)
    in_fp64 = compare_logits(base, [adapter], None, out)
    assert (in_fp32.ok, in_fp64.ok) == (False, True)
    assert in_fp64.rounding == pytest.approx(in_fp32.rounding, rel=1e-2)
    merged, state = load(out), load(base)
    for name in ("blocks.11.ffn.value.weight", "blocks.6.att.key.weight"):
        save(merged | {name: state[name].bfloat16()}, out)
        assert not compare_logits(base, [adapter], None, out).ok


def test_the_command_verifies_a_pth_file_before_it_appears(tmp_path, capsys, monkeypatch):
    base = base_file(tmp_path, 7, torch.bfloat16)
    adapter = rwkv_peft_file(tmp_path / "rwkv-0.pth", load(base), 7, "bat", "disha")
    command = ["merge", str(base), str(adapter), str(tmp_path / "out.pth"), "--verify"]
    before = listing(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("flashbone.merge.write.edited", lambda edit, stored, dtype: stored.to(dtype))
        assert main(command) == 1
    assert "verification FAILED: outputs differ by" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert "flashbone merge: OK: outputs agree to" in captured.err
    assert json.loads(captured.out)["verification"]["ok"]


OTHERS = {
    "is an RWKV-5 model": ["blocks.0.att.time_mix_g"],
    "is an RWKV-4 or 5 model": ["blocks.0.att.time_mix_k"],
    "is no RWKV model": ["blocks.0.att.key.weight"],
    r"as an RWKV-7 model: blocks\.1\.ln2\.bias is missing": None,
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_models_are_refused_by_name_before_the_merge_and_merge_without_it(tmp_path, capsys, message):
    base = base_file(tmp_path, 7)
    state = load(base)
    if names := OTHERS[message]:
        state = {"emb.weight": torch.randn(10, 8), "blocks.0.att.key.weight": torch.randn(8, 8)}
        state |= {name: torch.randn(8, 8) for name in names}
    else:
        del state["blocks.1.ln2.bias"]
    save(state, base)
    blocks = {"blocks.0.att.key": block_of(state["blocks.0.att.key.weight"], "bone")}
    adapter = write_adapter(tmp_path / "adapter", "bone", blocks)
    with pytest.raises(FormatError, match=rf"base\.pth: {message}.*; it can be merged, but not verified$"):
        check_verifiable(base, [adapter], None)
    before = listing(tmp_path)
    command = ["merge", str(base), str(adapter), str(tmp_path / "out.pth")]
    assert main([*command, "--verify"]) == 1
    assert "it can be merged, but not verified" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert main(command) == 0


def test_two_adapters_that_both_train_norms_are_refused(tmp_path):
    base = base_file(tmp_path, 6)
    adapter = rwkv_peft_file(tmp_path / "one.pth", load(base), 6, "bone", "disha")
    shutil.copy(adapter, tmp_path / "two.pth")
    with pytest.raises(ConfigError, match=r"one\.pth, .*two\.pth: such a merge cannot be verified"):
        check_verifiable(base, [adapter, tmp_path / "two.pth"], None)
