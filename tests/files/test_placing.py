"""Which tensor of a base a part of an adapter changes, in which orientation, and what is said where it does not fit."""

from pathlib import Path

import pytest
import torch

from flashbone import variants
from flashbone.errors import FormatError, ShapeError
from flashbone.files import placing
from flashbone.files.adapter import Adapter, is_same
from flashbone.files.base import BaseModel
from flashbone.files.placing import PlacedTensor, place
from flashbone.files.tensors import TensorEntry
from helpers.blocks import random_block

BONE = variants.get("bone")


def base(dtype: str = "F32", **shapes: tuple[int, ...]) -> BaseModel:
    entries = {name.replace("__", "."): TensorEntry(name, dtype, shape, 0, 0) for name, shape in shapes.items()}
    return BaseModel(Path("base"), (), entries, {"model_type": "llama"}, ())


@pytest.mark.parametrize(
    ("place", "matrix"),
    [
        (PlacedTensor("w", shape=(8, 12)), (8, 12)),
        (PlacedTensor("w", shape=(8, 12), transposed=True), (12, 8)),
        (PlacedTensor("w", shape=(8, 3, 5, 2)), (8, 30)),
        (PlacedTensor("w", shape=(4, 8, 12), stacked=True), (8, 12)),
        (PlacedTensor("w", shape=(4, 8, 12), stacked=True, transposed=True), (12, 8)),
    ],
)
def test_the_matrix_of_a_place_is_out_by_in_of_one_expert(place, matrix):
    assert place.matrix == matrix


@pytest.mark.parametrize(("transposed", "shape"), [(False, (4, 8, 12)), (True, (4, 12, 8))])
@pytest.mark.parametrize("name", ["bone", "bat-col", "bat-row"])
def test_a_block_for_each_expert_is_placed_on_their_stack(name, transposed, shape):
    block = torch.stack([random_block(name, 8, 12, 2) for _ in range(4)])
    names = frozenset(["experts.up"])
    adapter = Adapter(
        variants.get(name),
        {"experts.up": block},
        {},
        {},
        transposed=names if transposed else frozenset(),
        parameters=names,
    )
    assert adapter.parameter("experts.up") == "experts.up"
    (found,) = place(base(experts__up=shape), adapter)
    assert (found.stacked, found.transposed, found.matrix, found.name) == (True, transposed, (8, 12), "experts.up")
    with pytest.raises(ShapeError, match=r"experts.up: a .* does not fit a layer with 8 output and 12 input"):
        place(base(experts__up=shape), Adapter(**vars(adapter) | {"blocks": {"experts.up": block[:3]}}))


def test_what_is_lost_is_named_with_why_and_the_way_out():
    known = base(q__weight=(8, 12))
    blocks = {"lm_head": torch.ones(4, 8), "k": torch.ones(4, 8), "up": torch.ones(4, 8)}
    adapter = Adapter(BONE, blocks, {"score.weight": torch.ones(2, 8)}, {}, parameters=frozenset(["up"]))
    with pytest.raises(FormatError) as caught:
        place(known, adapter, ["something else"])
    lines = str(caught.value).removeprefix("the adapter does not fit base: ").split("; ")
    assert lines[0] == "something else"
    assert "lm_head.weight: not in the base (is it tied to another tensor?); is it an adapter" in str(caught.value)
    assert "k.weight: not in the base; is it an adapter of another model?" in str(caught.value)
    assert "up: not in the base, which may keep every expert by itself" in str(caught.value)
    assert "score.weight: not in the base, but the adapter holds a value for it" in str(caught.value)


def test_a_value_takes_another_shape_where_only_axes_of_one_differ():
    value = torch.arange(3.0)
    assert placing.shaped(value, (1, 1, 3)).shape == (1, 1, 3)
    assert placing.shaped(value.view(1, 3), (3,)).shape == (3,)
    assert placing.shaped(value, (1, 4)) is value
    assert placing.shaped(torch.ones(2, 3), (3, 2)).shape == (2, 3)


@pytest.mark.parametrize("is_pth", [True, False])
def test_vectors_of_an_rwkv_file_may_have_other_axes_of_one_and_those_of_others_may_not(tmp_path, is_pth):
    entries = {"x_r": TensorEntry("x_r", "F32", (1, 1, 3), 0, 12)}
    (tmp_path / "model.pth").touch()
    model = BaseModel(tmp_path / "model.pth" if is_pth else tmp_path, (), entries, {}, ())
    adapter = Adapter(BONE, {}, {"x_r": torch.arange(3.0)}, {})
    if is_pth:
        (found,) = place(model, adapter)
        assert found.replacement is not None
        assert found.replacement.shape == (1, 1, 3)
    else:
        with pytest.raises(ShapeError, match=r"x_r: the adapter's value has shape \(3,\), the base's \(1, 1, 3\)"):
            place(model, adapter)


def test_a_layer_of_numbers_that_are_not_plain_floats_is_refused():
    with pytest.raises(ShapeError, match=r"q\.weight: is stored as I8, wanted F64, F32, BF16, F16"):
        place(base("I8", q__weight=(8, 12)), Adapter(BONE, {"q": torch.ones(4, 8)}, {}, {}))


def test_adapters_are_the_same_where_they_hold_the_same_tensors_and_mean_the_same():
    block, value = torch.ones(4, 8), torch.ones(8)
    one = Adapter(BONE, {"q": block}, {"q.bias": value}, {"r": 4}, "org/base")
    assert is_same(one, Adapter(**vars(one) | {"config": {}}))
    for change in (
        {"variant": variants.get("mini")},
        {"blocks": {"q": block.clone()}},
        {"blocks": {"k": block}},
        {"replacements": {}},
        {"base_model": None},
        {"transposed": frozenset("q")},
        {"parameters": frozenset("q")},
    ):
        assert not is_same(one, Adapter(**vars(one) | change))
