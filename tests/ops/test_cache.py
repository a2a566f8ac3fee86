"""What inference keeps between calls, and that nothing stale is ever used."""

import copy
import pickle

import pytest
import torch
from torch import nn

from flashbone.ops.cache import Cache
from helpers.blocks import VARIANT_NAMES, random_block
from helpers.comparison import Promise, close, same_bits

OUT, IN = 11, 13
KEPT_ALONE = ("bat-col", "orthogonal")  # what is computed from one adapter; the others' blocks are used as they are


def make_layer(variants: tuple[str, ...], scale: float = 0.5):
    from flashbone import BoneLinear

    layer = None
    for i, variant in enumerate(variants):
        if layer is None:
            layer = BoneLinear(nn.Linear(IN, OUT).double(), "0", 4, False, variant=variant, mini_r=3)
        else:
            layer.update_layer(str(i), 4, False, variant=variant, mini_r=3)
        layer.bone_block[str(i)].data = random_block(variant, OUT, IN, 4)
        layer.set_scale(str(i), scale)
    layer.set_adapter([str(i) for i in range(len(variants))])
    return layer.eval()


def fresh(layer, x):
    """The output as it is without any cache."""
    with torch.enable_grad():
        return copy.deepcopy(layer)(x).detach()


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def without_grad(request):
    return request.param


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_nothing_is_built_twice_and_every_change_is_seen(name, without_grad):
    layer, x = make_layer((name, name)), torch.randn(2, IN, dtype=torch.float64)
    block, base = layer.bone_block["0"], layer.base_layer

    def optimizer_step():
        with torch.no_grad():
            block.add_(0.25)

    def loaded():
        block.data = torch.randn_like(block)

    def scaled():
        layer.set_scale("0", -1.5)

    def base_changed():
        with torch.no_grad():
            base.weight.mul_(2)

    def base_replaced():
        base.weight = nn.Parameter(torch.randn_like(base.weight))

    def fewer():
        layer.set_adapter("1")
        layer.set_scale("1", 0.75)

    for change in (lambda: None, optimizer_step, loaded, scaled, base_changed, base_replaced, fewer):
        change()
        want = fresh(layer, x)
        with without_grad():
            assert close(layer(x), want)
            entries = list(layer._cache._entries.values())
            assert len(entries) == (name in KEPT_ALONE or change is not fewer)
            assert close(layer(x), want)
            assert all(a is b for a, b in zip(layer._cache._entries.values(), entries, strict=True))


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_of_one_adapter_only_a_shifted_weight_and_a_rotation_are_kept(name):
    for scale, dtype in ((1.0, torch.float64), (0.5, torch.bfloat16)):
        layer = make_layer((name,), scale)
        layer.base_layer.to(dtype)
        with torch.no_grad():
            layer(torch.randn(2, IN, dtype=dtype))
        assert len(layer._cache) == (name in KEPT_ALONE)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_transforms_neither_use_nor_fill_the_cache(name):
    layer, x = make_layer((name, name)), torch.randn(5, 2, IN, dtype=torch.float64)
    blocks = dict(layer.named_parameters())
    with torch.no_grad():
        want = layer(x)
        for _ in range(2):
            got = torch.func.vmap(lambda x: torch.func.functional_call(layer, blocks, (x,)))(x)
            assert close(got, want)
            assert close(layer(x), want)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_ensembles_of_blocks_by_torch_func_use_no_cache(name):
    layer, x = make_layer((name, name)), torch.randn(2, IN, dtype=torch.float64)
    blocks = {n: torch.stack([p.detach(), -2 * p.detach()]) for n, p in layer.named_parameters() if "bone_block" in n}
    with torch.no_grad():
        want = torch.stack(
            [torch.func.functional_call(layer, {n: b[i] for n, b in blocks.items()}, (x,)) for i in range(2)]
        )
        for _ in range(2):
            got = torch.func.vmap(lambda blocks: torch.func.functional_call(layer, blocks, (x,)))(blocks)
            assert close(got, want)


def test_nothing_is_kept_in_distributed_runs_nor_in_replicas(monkeypatch):
    x = torch.randn(2, IN, dtype=torch.float64)
    for change in ("distributed", "replica"):
        layer = make_layer(("bat-col", "bat-col"))
        if change == "replica":
            layer.__dict__["_is_replica"] = True
        else:  # FSDP2 gathers into the same storage, past the version counter
            monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        with torch.no_grad():
            assert close(layer(x), fresh(layer, x))
        assert len(layer._cache) == 0


def test_a_transposed_source_is_another_source():
    cache, square = Cache(), torch.randn(3, 3)
    for source in (square, square.T, square):
        got = cache.get("role", (), [source], lambda source=source: source.clone())
        assert same_bits(got, source, Promise.STORED)


@pytest.mark.parametrize("drop", ["train", "grad", "merge", "switch", "delete", "dtype", "off"])
def test_the_cache_is_dropped(drop):
    layer, x = make_layer(("bat-col", "bat-col")), torch.randn(2, IN, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
        assert len(layer._cache) == 1
        if drop == "train":
            layer.train()
        elif drop == "merge":
            layer.merge()
        elif drop == "switch":
            layer.set_adapter("0")
        elif drop == "delete":
            layer.delete_adapter("0")
        elif drop == "dtype":
            layer.float()
        elif drop == "off":
            layer.caches = False
            layer(x)
    if drop == "grad":
        layer(x)
    assert len(layer._cache) == 0


def test_a_shifted_weight_is_not_kept_for_calls_with_many_tokens_nor_in_training():
    layer = make_layer(("bat-col",))
    with torch.no_grad():
        layer(torch.randn(2, 8, IN, dtype=torch.float64))
        assert len(layer._cache) == 0
        layer(torch.randn(15, IN, dtype=torch.float64))
        (entry,) = layer._cache._entries.values()
        layer(torch.randn(2, 8, IN, dtype=torch.float64))  # but used if it is there
        assert next(iter(layer._cache._entries.values())) is entry
        layer.train()(torch.randn(2, IN, dtype=torch.float64))
        assert len(layer._cache) == 0


def test_a_kept_weight_under_autocast_has_the_dtype_of_the_call():
    layer, x = make_layer(("bat-col",)).float(), torch.randn(2, IN)
    want = fresh(layer, x)
    with torch.no_grad():
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = layer(x)
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
            assert close(y, want)


def test_copies_and_pickles_of_a_layer_carry_no_cache():
    layer = make_layer(("bat-col",))
    with torch.no_grad():
        layer(torch.randn(2, IN, dtype=torch.float64))
    assert len(layer._cache) == 1
    assert len(copy.deepcopy(layer)._cache) == len(pickle.loads(pickle.dumps(layer))._cache) == 0
    assert not any("cache" in name for name in layer.state_dict())


def test_sources_that_do_not_count_versions_are_not_trusted():
    cache, built = Cache(), []
    with torch.inference_mode():
        source = torch.ones(2)

    def build():
        built.append(source.sum())
        return source * 2

    for _ in range(2):
        cache.get("role", (), [source], build)
    assert len(built) == 2
    assert len(cache) == 0


def test_an_address_that_is_used_again_is_not_taken_for_the_old_tensor():
    cache, values = Cache(), []
    for i in range(20):  # freed memory of one size is handed out again at once, were it not held
        source = torch.full((1000,), float(i))
        values.append(float(cache.get("role", (), [source], lambda source=source: source.sum())))
        del source
    assert values == [1000.0 * i for i in range(20)]


def test_an_entry_that_another_thread_drops_meanwhile_is_built_anew():
    class Dropping:
        """Settings that differ from all others; to ask is to clear the cache, as another thread may at that moment."""

        def __eq__(self, _other):
            cache.clear()
            return False

        __hash__ = object.__hash__

    cache, source = Cache(), torch.ones(2)
    cache.get("role", Dropping(), [source], lambda: source + 1)
    assert same_bits(cache.get("role", (), [source], lambda: source + 2), source + 2, Promise.EXACT)
    assert len(cache) == 1
