"""What inference keeps: for one call of a model, so that no write to a parameter, however it is done, goes unseen."""

import copy

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from flashbone import BoneLinear
from flashbone.ops import moves
from flashbone.tuner.layers.calls import CURRENT, Gate, one_call
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import close
from helpers.mlp import fill_blocks

OUT, IN = 11, 13
KEPT_ALONE = ("bat-col", "orthogonal")  # what is computed from one adapter; the others' blocks are used as they are


def make_layer(variants: tuple[str, ...], scale: float = 0.5) -> BoneLinear:
    layer = BoneLinear(nn.Linear(IN, OUT).double().requires_grad_(False), "0", 4, False, variant=variants[0], mini_r=3)
    for i, variant in enumerate(variants[1:], 1):
        layer.update_layer(str(i), 4, False, variant=variant, mini_r=3)
    for i, variant in enumerate(variants):
        layer.bone_block[str(i)].data = random_block(variant, OUT, IN, 4)
        layer.set_scale(str(i), scale)
    layer.set_adapter([str(i) for i in range(len(variants))])
    return layer.eval()


def fresh(layer: BoneLinear, x: torch.Tensor) -> torch.Tensor:
    """The output of a copy that was never called."""
    with torch.enable_grad():
        return copy.deepcopy(layer)(x).detach()


def fused_step(p: nn.Parameter) -> None:
    """AdamW of transformers' default, which raises no version."""
    was, p.requires_grad = p.requires_grad, True
    p.grad = torch.randn_like(p)
    torch.optim.AdamW([p], lr=0.3, fused=True).step()
    p.requires_grad, p.grad = was, None


def swapped(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(torch.randn_like(p), p.requires_grad))


@torch.no_grad()
def no_grad_add(p: nn.Parameter) -> None:
    p.add_(torch.randn_like(p))


@torch.no_grad()
def foreach_lerp(p: nn.Parameter) -> None:
    torch._foreach_lerp_([p.data], [torch.randn_like(p)], 0.5)


def into_data(p: nn.Parameter) -> None:
    p.data.mul_(0.5).add_(torch.randn_like(p), alpha=0.5)  # an EMA


def new_data(p: nn.Parameter) -> None:
    p.data = torch.randn_like(p)


def through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[...] *= -2


WRITES = [fused_step, swapped, no_grad_add, foreach_lerp, into_data, new_data, through_numpy]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_every_write_to_a_block_or_a_base_is_seen_by_the_next_call(name, write, trained):
    layer, x, gate = make_layer((name, name)), torch.randn(2, IN, dtype=torch.float64), Gate()
    layer.bone_block.requires_grad_(trained)
    for parameter in (layer.bone_block["0"], layer.base_layer.weight, layer.bone_block["1"]):
        with torch.no_grad(), one_call(gate):
            before = [layer(x) for _ in range(3)][-1]
        write(parameter)
        with torch.no_grad(), one_call(gate):
            after = [layer(x) for _ in range(3)]
        want = fresh(layer, x)
        assert not close(before, want)
        assert all(close(y, want) for y in after)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_call_builds_each_thing_once(name, monkeypatch):
    layer, x, built = make_layer((name, name)), torch.randn(2, IN, dtype=torch.float64), []
    for function in ("shifted_weight", "rotation_offset", "_combine"):
        original = getattr(moves, function)
        monkeypatch.setattr(moves, function, lambda *a, f=original: built.append(f.__name__) or f(*a))
    counts = []
    with torch.no_grad(), one_call(Gate()):
        for _ in range(5):
            built.clear()
            layer(x)
            counts.append(len(built))
    assert counts[2:] == [0, 0, 0]
    with torch.no_grad():
        layer(x)
    assert built


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_of_one_adapter_only_a_shifted_weight_and_a_rotation_are_kept(name):
    layer = make_layer((name,))
    with torch.no_grad(), one_call(Gate()):
        for _ in range(2):
            layer(torch.randn(2, IN, dtype=torch.float64))
        assert sum(len(kept.values) for kept in CURRENT.kept.values()) == (name in KEPT_ALONE)
        layer.caches = False
        CURRENT.kept.clear()
        layer(torch.randn(2, IN, dtype=torch.float64))
        assert not CURRENT.kept
    assert CURRENT.kept is None


def test_a_shifted_weight_is_not_kept_for_many_tokens_nor_while_two_threads_call():
    layer, few = make_layer(("bat-col",)), torch.randn(2, IN, dtype=torch.float64)
    for gate, x, count in ((Gate(), few, 1), (Gate(), few.repeat(8, 1), 0), (Gate(), few, 0)):
        if count == 0 and x is few:
            gate._calls[-1] = 1  # a call of some other thread
        with torch.no_grad(), one_call(gate):
            for _ in range(3):
                layer(x)
            assert sum(len(kept.values) for kept in CURRENT.kept.values()) == count


@pytest.mark.parametrize("change", ["set_scale", "set_adapter", "merge_adapter"])
def test_a_change_inside_a_call_drops_what_is_kept(change):
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), BoneConfig(r=4, variant="bat-col", target_modules=["0"]))
    model.add_adapter("second", BoneConfig(r=4, variant="bat-col", target_modules=["0"]))
    fill_blocks(model)
    model, x = model.eval(), torch.randn(2, IN)
    arguments = {"set_scale": ("default", -1.0), "set_adapter": ("second",), "merge_adapter": ()}[change]
    with torch.no_grad():
        with model.unchanged():
            for _ in range(3):
                before = model.base_model.model(x)
            getattr(model.base_model, change)(*arguments)
            after = [model.base_model.model(x) for _ in range(3)]
        want = model(x)
    assert all(close(y, want) for y in after)
    assert close(before, want) is (change == "merge_adapter")


def test_generation_keeps_a_weight_from_its_second_step_on_and_nothing_afterwards(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BoneConfig(r=4, variant="bat-col", target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), config).eval()
    fill_blocks(model)
    built, original = [], moves.shifted_weight
    monkeypatch.setattr(moves, "shifted_weight", lambda *a: built.append(1) or original(*a))
    ids = torch.randint(5, 50, (1, 5))
    fields = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    got = [model.generate(input_ids=ids, **fields) for _ in range(2)]
    assert len(built) == 2 * 2  # layers, generations
    model.base_model.cache_in_inference(False)
    assert model.generate(input_ids=ids, **fields).tolist() == got[0].tolist() == got[1].tolist()
    assert len(built) == 4
    assert CURRENT.kept is None


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_a_block_of_another_dtype_is_cast_once_a_call(name):
    """As PEFT keeps blocks, in fp32 on a base in bf16."""
    layer, x = make_layer((name,)).bfloat16(), torch.randn(2, IN, dtype=torch.bfloat16)
    layer.bone_block.float()
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                casts[-1].append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        for _ in range(2):
            with one_call(Gate()), Casts():
                for _ in range(4):
                    casts.append([])
                    layer(x)
    assert casts[0] == casts[4] != []  # a new call sees new values
    assert casts[2] == casts[3] == casts[6] == casts[7] == []


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_transforms_neither_use_nor_fill_what_is_kept(name):
    layer, x = make_layer((name, name)), torch.randn(5, 2, IN, dtype=torch.float64)
    blocks = dict(layer.named_parameters())
    stacks = {n: torch.stack([p.detach(), -2 * p.detach()]) for n, p in blocks.items() if "bone_block" in n}
    with torch.no_grad(), one_call(Gate()):
        want = layer(x)
        for _ in range(2):
            got = torch.func.vmap(lambda x: torch.func.functional_call(layer, blocks, (x,)))(x)
            assert close(got, want)
            both = torch.func.vmap(lambda blocks: torch.func.functional_call(layer, blocks, (x,)))(stacks)
            assert close(both[0], want)
            assert not close(both[1], want)
            assert close(layer(x), want)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_what_is_kept_under_autocast_has_the_dtype_of_the_step(name):
    layer, x = make_layer((name, name)).float(), torch.randn(2, IN)
    want = fresh(layer, x)
    with torch.no_grad(), one_call(Gate()):
        for enabled in (True, False, True, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = layer(x)
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
            assert close(y, want)


def test_copies_of_a_model_have_a_gate_of_their_own():
    config = BoneConfig(r=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config).eval()
    with model.unchanged():
        other = copy.deepcopy(model)
        assert other.base_model.gate is not model.base_model.gate
