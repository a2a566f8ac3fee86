"""Parameters that are trained whole, where a host shards or offloads the model."""

import pytest
import torch
from accelerate import cpu_offload
from decay_models import base, config, inputs, trained
from peft import get_peft_model
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.model.saved_parameters import find
from helpers.comparison import Promise, close, same_bits
from helpers.processes import run_apart


@pytest.mark.parametrize("mark", ["ds_status", "full_tensor"])
def test_shards_are_refused_where_an_adapter_is_added_and_where_a_value_is_read(mark):
    bare = base()
    setattr(bare.scale, mark, None)
    with pytest.raises(ConfigError, match="parameters_to_save: scale: it is sharded or offloaded; add the adapter to"):
        get_peft_model(bare, config("scale"))
    model = trained("scale")
    shard = nn.Parameter(torch.empty(0))
    setattr(shard, mark, None)
    find(model)[0].bone_parameter._parameters["default"] = shard
    with pytest.raises(
        ConfigError, match=r"scale: a single parameter .* cannot be read from shards of FSDP2 or ZeRO-3"
    ):
        model(inputs())


FSDP2 = """
import sys
sys.path += sys.argv[1:]
import torch, torch.distributed as dist
import flashbone
from helpers.comparison import close
from peft import BoneConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

class Mix(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.decay = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.key(x) * self.decay

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = Mix()

    def forward(self, x):
        return x + self.mix(x)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = BoneConfig(r=4, target_modules=["key"], init_weights=False, parameters_to_save=["decay"])
model, x = get_peft_model(torch.nn.Sequential(Layer(), Layer()), config), torch.randn(3, 8)
want = model(x)
want.sum().backward()
grads = [p.grad for p in model.parameters() if p.requires_grad]
model.zero_grad()
for layer in model.base_model.model:
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
got = model(x)
got.sum().backward()
sharded = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
assert close(got, want) and all(map(close, sharded, grads)) and len(grads) == 4
for change in (lambda: model.base_model.model[0].mix.decay, model.merge_adapter, model.unload):
    try:
        change()
    except flashbone.FlashboneError as error:
        print(error)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2_may_shard_whole_layers_and_what_would_need_them_whole_is_refused(tmp_path):
    done = run_apart(FSDP2, tmp_path)
    said = ["cannot be read from shards", "it is sharded or offloaded, so", "cannot be made plain again there"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(said), done.stderr
    assert all(line.startswith("0.mix.decay: ") and part in line for line, part in zip(lines, said, strict=True))


def test_values_of_an_offloaded_model_are_used_and_not_trained_nor_merged():
    model = trained("time_decay", "scale").eval()
    want = model(inputs())
    cpu_offload(model, torch.device("cpu"))
    with torch.no_grad():
        assert close(model(inputs()), want)  # an offloaded base is called as it is, not on the rows of a matrix
        with model.disable_adapter():
            assert same_bits(model(inputs()), base()(inputs()), Promise.SAME_PRODUCT)
    model.set_requires_grad("default")
    with pytest.raises(ConfigError, match="was offloaded with the model and cannot be trained"):
        model.train()(inputs())
    for change in (model.merge_adapter, model.merge_and_unload, model.unload):
        with pytest.raises(ConfigError, match=r"time_decay: it (is|was) sharded or offloaded"):
            change()
    with pytest.raises(ConfigError, match=r"time_decay .and 1 more.: it is sharded or offloaded; add the adapter to a"):
        get_peft_model(cpu_offload(base(), torch.device("cpu")), config("time_decay"))
    with torch.no_grad():
        assert close(model.eval()(inputs()), want)
