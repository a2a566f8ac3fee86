"""What is written to a base while adapters are merged into it, and merges that are interrupted."""

import pytest
import torch
from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.layers.merged_base import fingerprint, is_written
from helpers.comparison import Promise, close, same_bits
from tuner.adapted_models import adapted, assert_unchanged, inputs, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged"),
    pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8]


def weight(model) -> nn.Parameter:
    return model.base_model.model.lin1.base_layer.weight


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("write", ["add_", "data", "one_value", "swapped_rows"])
def test_a_write_to_a_merged_base_is_named_and_neither_kept_nor_dropped_silently(write, keeps):
    model = adapted("bone", "mini")
    model.base_model.keep_originals(keeps)
    pristine = weight(model).detach().clone()
    model.merge_adapter(["0"])
    with torch.no_grad():
        if write == "add_":
            weight(model).add_(1)
        elif write == "data":
            weight(model).data = torch.randn_like(weight(model))
        elif write == "one_value":
            weight(model)[2, 3] += 1e-9
        else:
            weight(model).copy_(weight(model)[torch.tensor([1, 0, *range(2, len(weight(model)))])])
    before, message = snapshot(model), r"lin1: the base was written to while '0' is merged into it, which unmerging"
    for change in (
        model.unmerge_adapter,
        lambda: model.merge_adapter(["1"]),
        lambda: model.set_adapter("1"),
        lambda: model.disable_adapter().__enter__(),
        lambda: model.merge_and_unload(adapter_names=["0", "1"]),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            change()
        assert "\n" not in str(error.value)
        assert_unchanged(model, before)
        assert model.base_model.model.lin0.merged
    if keeps:
        model.base_model.unmerge_adapter(discard_writes=True)
        assert same_bits(weight(model), pristine, Promise.UNTOUCHED)
    else:
        written = weight(model).detach().clone()
        assert same_bits(model.merge_and_unload().lin1.weight, written, Promise.STORED)


def test_casts_and_moves_of_a_merged_model_are_no_writes():
    model = adapted("bat-col")
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    assert not model.base_model.model.lin0.merged
    tensor = torch.randn(3, 4)
    assert not is_written(tensor.clone().t().contiguous().t(), fingerprint(tensor))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8]
)
def test_any_tensor_has_a_fingerprint(shape, dtype):
    tensor = (torch.randn(shape) * 9).to(dtype)
    before = fingerprint(tensor)
    assert not is_written(tensor.clone(), before)
    if tensor.numel():
        tensor.view(-1)[-1] += 1
        assert is_written(tensor, before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("level", ["PeftModel", "BoneModel", "base", "layer"])
def test_a_state_dict_with_merged_weights_is_refused_before_anything_is_loaded(level, strict):
    model = adapted("bone")
    parts = {"PeftModel": model, "BoneModel": model.base_model, "base": model.base_model.model}
    part = parts.get(level, model.base_model.model.lin0)
    state = {key: torch.zeros_like(tensor) for key, tensor in part.state_dict().items()}
    model.base_model.model.lin0.merge()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"state dict: it holds .*weight, and adapters are merged there, so that"):
        part.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)
    model.base_model.model.lin0.unmerge()
    part.load_state_dict(state)
    assert not model.base_model.model.lin0.base_layer.weight.any()


def test_what_belongs_to_adapters_loads_while_they_are_merged():
    model = adapted("bone", "mini")
    model.merge_adapter(["0"])
    blocks = {key: tensor * 2 for key, tensor in model.state_dict().items() if "bone_block" in key}
    model.load_state_dict(blocks, strict=False)
    model.unmerge_adapter()
    layer = model.base_model.model.lin0
    assert same_bits(layer.bone_block["0"], blocks["base_model.model.lin0.bone_block.0"], Promise.STORED)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("already", [[], ["1"]])
@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_merge_leaves_the_model_as_it_was(at, already, after, keeps, monkeypatch):
    model, x = adapted("bone", "mini").eval(), inputs()
    model.base_model.keep_originals(keeps)
    if already:
        model.merge_adapter(already)
    before, want = snapshot(model), model(x)
    kind, count = type(model.base_model.model.lin0.base_kind), []
    original = kind.write

    def write(self, module, W):
        count.append(1)
        if len(count) - 1 != at:
            return original(self, module, W)
        if after:
            original(self, module, W)
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "write", write)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter(["0"])
    monkeypatch.undo()
    state = snapshot(model)[0]
    if keeps:
        assert_unchanged(model, before)
    assert all(close(state[key], tensor) for key, tensor in before[0].items())
    assert close(model(x), want)
    model.merge_adapter(["0", "1"])
    model.unmerge_adapter()
    assert [model.base_model.model.lin0.merged, model.base_model.model.lin1.merged] == [False, False]
