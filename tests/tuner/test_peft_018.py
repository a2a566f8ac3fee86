"""PEFT 0.18.1, the last release with BONE, against flashbone: its files here, our files there."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import flashbone
from flashbone.files import peft
from golden.cases import CASES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import MLP, fill_blocks, results

TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden" / "peft-0.18.1"
ORACLE = TESTS.parent / ".venv" / "peft-0.18.1"


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    assert got.keys() == want.keys()
    assert any(key.startswith("grad:") for key in want)
    for key in want:
        assert close(got[key], want[key], dtype), key


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_peft_018_load_and_do_the_same(name):
    sizes, _ = CASES[name]
    model = PeftModel.from_pretrained(MLP(sizes), GOLDEN / name, is_trainable=True)
    want = load_file(GOLDEN / name / "expected.safetensors")
    assert isinstance(model.peft_config["default"], flashbone.BoneConfig)
    assert model.peft_config["default"].variant == ("bat-col" if "bat" in name else "bone")
    assert_same(results(model, sizes[0]), want)


@pytest.mark.parametrize("name", ["bone", "bone-ragged", "bone-bias", "bat", "bat-square"])
def test_unmerged_adapters_of_peft_018_give_the_base_back(name):
    sizes, _ = CASES[name]
    base = {k: v.clone() for k, v in MLP(sizes).state_dict().items() if k.endswith("weight")}
    model = PeftModel.from_pretrained(MLP(sizes), GOLDEN / name)
    model.merge_adapter()
    model.unmerge_adapter()
    for key, weight in model.unload().state_dict().items():
        if key.endswith("weight"):
            assert same_bits(weight, base[key], Promise.UNTOUCHED)


def test_the_random_start_is_the_one_of_peft_018():
    sizes, fields = CASES["bone-random-start"]
    torch.manual_seed(0)
    model = get_peft_model(MLP(sizes), BoneConfig(**fields))
    want = load_file(GOLDEN / "bone-random-start" / "expected.safetensors")
    assert_same(results(model, sizes[0]), want, torch.float32)  # drawn in fp32, which processors round differently


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE.is_dir(), reason="peft 0.18.1 is not installed beside the environment (make test does)")
def test_files_written_here_load_in_peft_018_and_do_the_same(tmp_path):
    cases = {name: case for name, case in CASES.items() if name != "bone-random-start"}
    cases["bat-col"] = (8, 8, 8), {"r": 4, "target_modules": ["lin0", "lin1"], "variant": "bat-col"}
    ours = {}
    for name, (sizes, fields) in cases.items():
        model = get_peft_model(MLP(sizes), BoneConfig(**fields))
        fill_blocks(model)
        model.save_pretrained(tmp_path / name)
        ours[name] = results(model, sizes[0])
        (tmp_path / f"{name}-again").mkdir()  # as conversion writes them, from tensors alone
        adapter = peft.read(tmp_path / name)
        peft.write(adapter if "bias" in fields else replace(adapter, config={}), tmp_path / f"{name}-again")
    sizes = json.dumps({str(tmp_path / f"{n}{end}"): case[0] for n, case in cases.items() for end in ("", "-again")})
    environment = os.environ | {"PYTHONPATH": str(ORACLE), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TESTS / "golden" / "read_with_peft.py"), sizes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in cases:
        for folder in (name, f"{name}-again"):
            assert_same(ours[name], load_file(tmp_path / folder / "theirs.safetensors"))


def test_pickled_weights_of_older_peft_load(tmp_path):
    sizes, _ = CASES["bat-square"]
    shutil.copytree(GOLDEN / "bat-square", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    model = PeftModel.from_pretrained(MLP(sizes), tmp_path / "adapter", is_trainable=True)
    assert_same(results(model, sizes[0]), load_file(GOLDEN / "bat-square" / "expected.safetensors"))
