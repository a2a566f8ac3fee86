"""What one does with an adapter: each operation carries out one thing on a case and asserts what must hold then.

The first line of each docstring says what its row in docs/support.md means.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from matrix_case import Case
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from flashbone.errors import FlashboneError, NonFiniteError, ShapeError
from helpers.comparison import Promise, same_bits

OPERATIONS: dict[str, Callable[[Case], None]] = {}


def operation(function: Callable[[Case], None]) -> Callable[[Case], None]:
    OPERATIONS[function.__name__.rstrip("_").replace("_", "-")] = function
    return function


@operation
def add(case: Case) -> None:
    """add an adapter: at first the model is as it was"""
    want = case.base_output()
    case.assert_close(case.adapted(init_weights=True)(case.x), want)


@operation
def forward(case: Case) -> None:
    """forward equals the formula"""
    case.assert_close(case.adapted()(case.x), case.formula("first"))


@operation
def backward(case: Case) -> None:
    """gradients of block and input equal those of the formula"""
    model, x = case.adapted(), case.differentiable_input()
    (block,) = case.blocks(model, "first")
    sources = [block] if x is None else [block, x]
    factors = torch.randn(case.base_output().shape).to(case.base_output())
    got = torch.autograd.grad((model(case.x if x is None else x) * factors).sum(), sources)
    want = case.formula_gradients("first", factors, with_input=x is not None)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        case.assert_close(a, b)


@operation
def train(case: Case) -> None:
    """an optimiser's steps lower the loss and change nothing but the block"""
    model = case.adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("bone_block" in name for name in trained)
    before = case.state_of_base(model)
    wanted = case.base_output()  # within reach: at a zero block
    optimizer = torch.optim.Adam(trained.values(), lr=5e-3)
    losses = []
    for _ in range(6):
        loss = (model(case.x) - wanted).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    case.assert_base_is(model, before)


@operation
def dropout(case: Case) -> None:
    """dropout acts in training alone"""
    model, plain = case.adapted(dropout=0.5), case.adapted()
    torch.manual_seed(1)
    assert not torch.equal(model.train()(case.x), plain.train()(case.x))
    assert same_bits(model.eval()(case.x), plain.eval()(case.x), Promise.SAME_PRODUCT)


@operation
def checkpointing(case: Case) -> None:
    """gradient checkpointing gives the same gradients"""
    model = case.adapted()
    (block,) = case.blocks(model, "first")
    want = torch.autograd.grad(model(case.x).float().square().sum(), block)
    got = torch.autograd.grad(checkpoint(model, case.x, use_reentrant=False).float().square().sum(), block)
    case.assert_close(got[0], want[0])


@operation
def autocast(case: Case) -> None:
    """autocast to bf16"""
    model = case.adapted()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(case.x)
        loss = got.float().square().sum()
    case.assert_close(got, case.formula("first"), torch.bfloat16)
    loss.backward()
    assert all(torch.isfinite(block.grad).all() for block in case.blocks(model, "first"))


@operation
def scale(case: Case) -> None:
    """scales"""
    model = case.adapted()
    model.base_model.set_scale("first", -0.5)
    case.assert_close(model(case.x), case.formula(("first", -0.5)))


@operation
def disable(case: Case) -> None:
    """disabled, the model is the base bit for bit"""
    model, want = case.adapted(), case.base_output()
    with model.disable_adapter():
        assert same_bits(model(case.x), want, Promise.SAME_PRODUCT)
    assert not torch.equal(model(case.x), want)


@operation
def second(case: Case) -> None:
    """a second adapter, of another size and variant, and switching"""
    model = case.adapted(second=True)
    want = {name: case.formula(name) for name in ("first", "second")}
    for name in ("second", "first"):
        model.set_adapter(name)
        case.assert_close(model(case.x), want[name])


@operation
def together(case: Case) -> None:
    """two adapters active at once are the sum of both"""
    model = case.adapted(second=True)
    model.base_model.set_adapter(["second", "first"])
    case.assert_close(model(case.x), case.formula("first", "second"))


@operation
def rows(case: Case) -> None:
    """an adapter for each row (`adapter_names`)"""
    model = case.adapted(second=True).eval()
    names = ["second", "first", "__base__", "first"]
    got = model(case.x, adapter_names=names)
    by_name = {"first": case.formula("first"), "second": case.formula("second"), "__base__": case.formula()}
    case.assert_close(got, torch.stack([by_name[name][row] for row, name in enumerate(names)]))


@operation
def weighted(case: Case) -> None:
    """a weighted sum as a new adapter"""
    model = case.adapted(twin=True)
    model.base_model.add_weighted_adapter(["first", "twin"], [0.5, -2.0], "sum")
    model.set_adapter("sum")
    case.assert_close(model(case.x), case.formula(("first", 0.5), ("twin", -2.0)))


@operation
def delete(case: Case) -> None:
    """deletion, also of the active adapter"""
    model = case.adapted(second=True)
    case.assert_close(model(case.x), case.formula("first"))
    with pytest.warns(UserWarning, match="first was active which is now deleted. Setting active adapter to second"):
        model.delete_adapter("first")
    case.assert_close(model(case.x), case.formula("second"))
    model.delete_adapter("second")
    got = model.base_model.model(case.x)  # PEFT cannot call a PeftModel without any
    assert same_bits(got, case.base_output(), Promise.SAME_PRODUCT)


@operation
def merge(case: Case) -> None:
    """merge"""
    model = case.adapted().eval()
    model.merge_adapter()
    case.assert_close(model(case.x), case.formula("first"), merged=True)


@operation
def merge_several(case: Case) -> None:
    """merge two adapters at once"""
    model = case.adapted(second=True).eval()
    model.merge_adapter(adapter_names=["second", "first"])
    case.assert_close(model(case.x), case.formula("first", "second"), merged=True)


@operation
def unmerge(case: Case) -> None:
    """unmerge, bit for bit, twenty times"""
    model, want = case.adapted().eval(), case.base_output()
    unmerged = model(case.x)
    before = case.state_of_base(model)
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    case.assert_base_is(model, before)
    assert same_bits(model(case.x), unmerged, Promise.SAME_PRODUCT)
    with model.disable_adapter():
        assert same_bits(model(case.x), want, Promise.SAME_PRODUCT)


@operation
def merge_not_finite(case: Case) -> None:
    """a safe merge of a broken adapter is refused and changes nothing"""
    model, want = case.adapted().eval(), case.base_output()
    case.blocks(model, "first")[0].data.flatten()[0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert same_bits(model(case.x), want, Promise.SAME_PRODUCT)


@operation
def merge_and_unload(case: Case) -> None:
    """merge_and_unload"""
    plain = case.adapted().eval().merge_and_unload()
    assert not case.blocks(plain, "first")
    case.assert_close(plain(case.x), case.formula("first"), merged=True)


@operation
def unload(case: Case) -> None:
    """unload gives the base back"""
    model = case.adapted(second=True)
    assert same_bits(model.unload()(case.x), case.base_output(), Promise.SAME_PRODUCT)


@operation
def delta(case: Case) -> None:
    """get_delta_weight is the difference that a merge makes"""
    layer = case.layer(case.adapted())
    case.assert_close(case.as_matrix(layer.get_delta_weight("first")), case.delta("first"), torch.float32)


@operation
def save(case: Case) -> None:
    """save and load"""
    model = case.adapted().eval()
    model.save_pretrained(case.folder)
    again = PeftModel.from_pretrained(case.model(), case.folder / "first").eval()
    with torch.no_grad():
        assert same_bits(again(case.x), model(case.x), Promise.SAME_PRODUCT)


@operation
def load_second(case: Case) -> None:
    """load an adapter beside another"""
    case.adapted(second=True).save_pretrained(case.folder)
    model = case.adapted()
    model.load_adapter(case.folder / "second", "loaded")
    model.set_adapter("loaded")
    case.assert_close(model(case.x), case.formula("second"))


@operation
def load_on_meta(case: Case) -> None:
    """load with low_cpu_mem_usage"""
    model = case.adapted().eval()
    model.save_pretrained(case.folder)
    again = PeftModel.from_pretrained(case.model(), case.folder / "first", low_cpu_mem_usage=True).eval()
    assert same_bits(case.blocks(again, "default")[0], case.blocks(model, "first")[0], Promise.STORED)
    with torch.no_grad():
        case.assert_close(again(case.x), model(case.x))  # the block lies where it lay in its file, aligned otherwise


@operation
def load_misfit(case: Case) -> None:
    """an adapter that does not fit is refused and changes nothing"""
    case.adapted().save_pretrained(case.folder)
    file = case.folder / "first" / "adapter_model.safetensors"
    save_file({name: block[..., :-1].contiguous() for name, block in load_file(file).items()}, file)
    bare, want = case.model(), case.base_output()
    with pytest.raises(ShapeError, match="does not fit this model"):
        PeftModel.from_pretrained(bare, case.folder / "first")
    assert same_bits(bare(case.x), want, Promise.SAME_PRODUCT)


@operation
def state_dict(case: Case) -> None:
    """get and set the state dict of an adapter"""
    model, other = case.adapted().eval(), case.adapted(init_weights=True).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model, adapter_name="first"), adapter_name="first")
    assert same_bits(other(case.x), model(case.x), Promise.SAME_PRODUCT)


@operation
def wrong_size(case: Case) -> None:
    """a block size that cannot be is refused and changes nothing"""
    bare, want = case.model(), case.base_output()
    with pytest.raises((FlashboneError, ValueError), match="positive"):
        case.attach(bare, r=0)
    assert same_bits(bare(case.x), want, Promise.SAME_PRODUCT)


@operation
def deepcopy(case: Case) -> None:
    """a deep copy is a model of its own"""
    model = case.adapted().eval()
    want, clone = model(case.x), copy.deepcopy(model)
    case.blocks(clone, "first")[0].data.mul_(2)
    assert same_bits(model(case.x), want, Promise.SAME_PRODUCT)
    assert not torch.equal(clone(case.x), want)


@operation
def pickle_(case: Case) -> None:
    """pickle"""
    model = case.adapted().eval()
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert same_bits(again(case.x), model(case.x), Promise.SAME_PRODUCT)


@operation
def inference_cache(case: Case) -> None:
    """what inference keeps follows every change of the block"""
    model = case.adapted(second=True).eval()
    model.base_model.set_adapter(["first", "second"])
    with torch.no_grad():
        model(case.x)
        case.assert_close(model(case.x), case.formula("first", "second"))
        case.blocks(model, "first")[0].copy_(case.value("twin"))
        case.assert_close(model(case.x), case.formula("twin", "second"))


@operation
def empty_batch(case: Case) -> None:
    """an empty batch"""
    model = case.adapted()
    assert model(case.x[:0]).shape == case.base_output()[:0].shape


@operation
def cast(case: Case) -> None:
    """model.to(dtype)"""
    model = case.adapted().eval()
    got = model.to(torch.bfloat16)(case.in_dtype(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    case.assert_close(got, case.formula("first"), torch.bfloat16)
