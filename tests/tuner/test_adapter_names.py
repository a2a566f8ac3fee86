"""Adapters may be called like modules and parameters; what torch or PEFT cannot hold is refused."""

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from torch import nn

from flashbone.errors import ConfigError
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks

NAMES = [
    "bias",
    "weight",
    "modules_to_save",
    "base_layer",
    "original_module",
    "bone_block",
    "0",
    "1",
    "layers",
    "model",
]
NAMES += ["base_model", "bone_dropout", "default", "module", "bone_block_0", "token_adapter", "a b", "ä", "layers_0-1"]
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers[1](self.layers[0](x).relu()))


def config(**fields) -> BoneConfig:
    return BoneConfig(
        **{"r": 3, "target_modules": ["layers.0", "layers.1"], "modules_to_save": ["head"], "init_weights": False}
        | fields
    )


def adapted(*names: str, **fields) -> PeftModel:
    model = get_peft_model(Net(), config(**fields), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    fill_blocks(model)
    for n, name in enumerate(names):
        head = model.base_model.model.head.modules_to_save[name]
        head.weight.data.mul_(n + 2)
        head.bias.data.add_(n + 1)
    return model


@pytest.mark.parametrize("bias", ["none", "bone_only", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_any_name_is_saved_and_loaded_with_biases_and_modules(name, bias, tmp_path):
    model = adapted(name, bias=bias)
    for key, parameter in model.named_parameters():
        if key.endswith("base_layer.bias"):
            parameter.data.add_(0.5 if bias != "none" else 0)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    for other in (name, "other"):
        assert close(PeftModel.from_pretrained(Net(), folder, adapter_name=other)(X), model(X))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_first", [True, False])
def test_files_of_adapters_beside_it_are_whole(name, is_first, tmp_path):
    names = [name, "other"] if is_first else ["other", name]
    model = adapted(*names)
    model.save_pretrained(tmp_path)
    for each in names:
        model.set_adapter(each)
        folder = tmp_path if each == "default" else tmp_path / each
        again = PeftModel.from_pretrained(Net(), folder, adapter_name="again")
        assert close(again(X), model(X))
        again.load_adapter(folder, name)
        again.set_adapter(name)
        assert close(again(X), model(X))
    rows = model.eval()(X, adapter_names=names)
    for row, each in enumerate(names):
        model.set_adapter(each)
        assert close(rows[row], model(X)[row])
    model.delete_adapter(names[0])
    assert close(model(X)[1], rows[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v1.0", "wanted one that is not empty and has no dot"),
        *(
            (name, "wanted one that torch's modules have no attribute of")
            for name in ("keys", "train", "_modules", "T_destination")
        ),
        ("head", "wanted no adapter 'head' beside the module 'head', which is saved whole"),
        ("my_head", "wanted no adapter 'my_head' beside the module 'head', which is saved whole"),
    ],
)
def test_names_that_torch_or_peft_cannot_hold_are_refused_in_one_line(name, message):
    model = Net()
    with pytest.raises(ConfigError, match=message) as error:
        get_peft_model(model, config(), adapter_name=name)
    assert "\n" not in str(error.value)
    assert type(model.layers[0]) is nn.Linear
    model = get_peft_model(model, config(), adapter_name="first")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["first"]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(same_bits(after[key], tensor, Promise.UNTOUCHED) for key, tensor in before.items())


def test_a_module_to_save_after_which_an_adapter_is_named_is_refused():
    model = get_peft_model(Net(), config(modules_to_save=None), adapter_name="head")
    with pytest.raises(ConfigError, match="got 'other', wanted no adapter 'head' beside the module 'head'"):
        model.add_adapter("other", config())
    assert list(model.peft_config) == ["head"]
