"""State tuning: what is learned starts sequences in the `rwkv` package, too, alone and beside an adapter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from flashbone import BoneConfig, rwkv
from flashbone.conversion import convert
from flashbone.errors import ConfigError, FormatError
from flashbone.files.states import read_state
from helpers.comparison import Promise, close, same_bits
from helpers.rwkv import write_rwkv

pytest.importorskip("rwkv", reason="rwkv is not installed; `make test` does it")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file in .*pth:UserWarning"
)  # peft looks for one
TOKENS = torch.tensor([[3, 17, 5, 5, 30, 1, 22, 9]])
# As the chats of the model's author load a state: version 6 of the package keeps key by value features.
PACKAGE = """
import json, sys, torch
version, model, state, tokens, out = json.loads(sys.argv[1])
from rwkv.model import RWKV
model, raw = RWKV(model=model.removesuffix(".pth"), strategy="cpu fp32"), torch.load(state, weights_only=True)
start = []
for i in range(len(raw)):
    wkv = raw[f"blocks.{i}.att.time_state"].float()
    hidden = wkv.shape[0] * wkv.shape[1]
    wkv = wkv.transpose(1, 2).contiguous() if version == 6 else wkv
    start += [torch.zeros(hidden), wkv, torch.zeros(hidden)]
torch.save(model.forward(tokens, start, full_output=True)[0], out)
"""


@pytest.fixture(params=[7, 6])
def version(request) -> int:
    return request.param


@pytest.fixture
def base(version, tmp_path):
    return write_rwkv(tmp_path / "base.pth", version)


def in_the_package(version, model, state, folder):
    job = json.dumps([version, str(model), str(state), TOKENS[0].tolist(), str(folder / "logits.pt")])
    env = os.environ | {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"} | ({"RWKV_V7_ON": "1"} if version == 7 else {})
    done = subprocess.run([sys.executable, "-c", PACKAGE, job], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt", weights_only=True)


def learn(model) -> list[float]:
    """Losses of a few steps on one text."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.05), []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits[0]


@pytest.mark.slow
def test_a_learned_state_gives_the_package_our_logits(version, base, tmp_path):
    model = rwkv.from_pth(base)
    before = logits(model)
    rwkv.add_time_state(model)
    same_bits(logits(model), before, Promise.STORED)
    losses = learn(model.train())
    assert losses[-1] < losses[0]
    rwkv.save_time_state(model, tmp_path / "state.pth")
    saved = read_state(tmp_path / "state.pth")
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        f"blocks.{i}.att.time_state": (4, 8, 8) for i in range(3)
    }
    close(in_the_package(version, base, tmp_path / "state.pth", tmp_path), logits(model), torch.float32)
    again = rwkv.from_pth(base)
    rwkv.load_time_state(again, tmp_path / "state.pth")
    same_bits(logits(again), logits(model), Promise.STORED)
    model.to_pth(tmp_path / "with-state.pth")  # as RWKV-PEFT merges a state into a model
    same_bits(logits(rwkv.from_pth(tmp_path / "with-state.pth")), logits(model), Promise.STORED)


@pytest.mark.slow
def test_a_state_is_learned_beside_an_adapter_and_saved_with_it(version, base, tmp_path):
    config = BoneConfig(r=4, target_modules=["att.key", "ffn.value"], parameters_to_save=["time_state"])
    model = get_peft_model(rwkv.from_pth(base), config)
    losses = learn(model.train())
    assert losses[-1] < losses[0]
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(name.endswith("att.time_state") for name in state) == 3
    loaded = PeftModel.from_pretrained(rwkv.from_pth(base), str(tmp_path / "adapter"))
    same_bits(logits(loaded), want, Promise.STORED)
    with loaded.disable_adapter():
        same_bits(logits(loaded), logits(rwkv.from_pth(base)), Promise.STORED)
    rwkv.save_time_state(loaded, tmp_path / "state.pth")
    convert(tmp_path / "adapter", tmp_path / "there.pth", "rwkv-peft")
    there = read_state(tmp_path / "there.pth")
    for name, value in read_state(tmp_path / "state.pth").items():
        same_bits(there[name], value, Promise.STORED)
    merged = loaded.merge_and_unload()
    close(logits(merged), want, torch.float32)
    merged.to_pth(tmp_path / "merged.pth")
    close(in_the_package(version, tmp_path / "merged.pth", tmp_path / "state.pth", tmp_path), want, torch.float32)


def test_without_its_adapter_the_model_has_no_state(base):
    config = BoneConfig(r=4, target_modules=["att.key"], parameters_to_save=["time_state"])
    names = list(rwkv.from_pth(base).state_dict())
    model = get_peft_model(rwkv.from_pth(base), config).unload()
    assert list(model.state_dict()) == names
    assert not model.config.has_time_state
    failed = BoneConfig(r=4, target_modules=["att.key"], parameters_to_save=["time_state", "no_such"])
    model = rwkv.from_pth(base)
    with pytest.raises(ConfigError, match="no parameter 'no_such'"):
        get_peft_model(model, failed)
    assert list(model.state_dict()) == names


def test_states_of_other_models_are_refused(base, tmp_path):
    model = rwkv.from_pth(base)
    with pytest.raises(ConfigError, match="no time_state"):
        rwkv.save_time_state(model, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="wanted an RWKV model"):
        rwkv.add_time_state(torch.nn.Linear(2, 2))
    torch.save({"blocks.0.att.time_state": torch.zeros(4, 8, 9), "emb.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(FormatError) as refused:
        rwkv.load_time_state(model, tmp_path / "odd.pth")
    for words in ("blocks.1.att.time_state is missing", "emb.weight is unknown", "(4, 8, 9), wanted (4, 8, 8)"):
        assert words in str(refused.value)
    assert not hasattr(model.blocks[0].att, "time_state")
