"""Threads that share a model: each call has the adapters of its own rows; changes of the model wait for calls."""

import contextlib
import copy
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from flashbone.errors import ConfigError, ShapeError
from flashbone.tuner.layers.calls import CURRENT
from flashbone.tuner.model.watching import ForwardWatch
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.mlp import fill_blocks

SIZE, THREADS = 6, 8
NAMES = [variant.upper() for variant in VARIANT_NAMES]


class Tiny(nn.Module):
    """A linear layer between two others, and a head that is trained whole."""

    def __init__(self, checkpoints: dict | None = None) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3)
        self.checkpoints = checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        body = lambda x: self.second(self.first(x).relu())  # noqa: E731
        return self.head(checkpoint(body, x, **self.checkpoints) if self.checkpoints else body(x))


def adapted(checkpoints: dict | None = None, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = None
    for variant in VARIANT_NAMES:
        config = BoneConfig(
            r=3, variant=variant, target_modules=["first", "second"], modules_to_save=["head"], init_weights=False
        )
        if model is None:
            model = get_peft_model(Tiny(checkpoints).to(dtype), config, adapter_name=variant.upper())
        else:
            model.add_adapter(variant.upper(), config)
    fill_blocks(model)
    for i, name in enumerate(NAMES):
        model.base_model.model.head.modules_to_save[name].weight.data.mul_(i + 1)
    return model.to(dtype).eval()


@torch.no_grad()
def outputs_of_each(model, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of every row of x with every adapter and with none."""
    outputs = {}
    for name in NAMES:
        model.set_adapter(name)
        outputs[name] = model(x)
    with model.disable_adapter():
        outputs["__base__"] = model(x)
    return outputs


@pytest.fixture
def often_switched():
    """Threads take turns often: else each waits 5 ms after each operation."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("calls", [160, pytest.param(10_000, marks=pytest.mark.slow)])
def test_calls_of_eight_threads_are_right(calls, often_switched):
    """Names that belonged to layers made one in nine wrong."""
    model, x = adapted(), torch.randn(9, SIZE, dtype=torch.float64)
    want = outputs_of_each(model, x)
    model.set_adapter("MINI")

    def run(seed: int) -> list[str]:
        generator, wrong = torch.Generator().manual_seed(seed), []
        choices = [*NAMES, "__base__"]
        with torch.no_grad():
            for n in range(calls // THREADS):
                if n % 4 == 3:
                    if (model(x) - want["MINI"]).abs().max() > 1e-9:
                        wrong.append("plain")
                    continue
                rows = int(torch.randint(1, 9, (), generator=generator))
                names = [choices[i] for i in torch.randint(0, len(choices), (rows,), generator=generator).tolist()]
                if n % 50 == 2:  # an error in one call concerns nobody else
                    with pytest.raises(ShapeError, match="names, but a layer gets an input"):
                        model(x, adapter_names=names)
                got = model(x[:rows], adapter_names=names)
                if (got - torch.stack([want[name][i] for i, name in enumerate(names)])).abs().max() > 1e-9:
                    wrong.append(str(names))
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert [wrong for found in pool.map(run, range(THREADS)) for wrong in found] == []
    assert CURRENT.rows is None
    assert all(close(got, want[name]) for name, got in outputs_of_each(model, x).items())


def test_changes_between_calls_of_other_threads_leave_every_call_with_one_state():
    model, x = adapted(), torch.randn(2, SIZE, dtype=torch.float64)
    want, stop = outputs_of_each(model, x), threading.Event()
    model.set_adapter("BONE")

    def call() -> int:
        count = 0
        with torch.no_grad():
            while not stop.is_set():
                got = model(x)
                assert any((got - y).abs().max() < 1e-9 for y in want.values())
                count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(call) for _ in range(4)]
        for n in range(30):
            model.set_adapter(NAMES[n % 5])
            with model.disable_adapter():
                assert close(model(x).detach(), want["__base__"])
            model.merge_adapter()
            model.unmerge_adapter()
        stop.set()
        assert all(future.result() for future in running)
    assert all(close(got, want[name]) for name, got in outputs_of_each(model, x).items())


def test_adapters_come_and_go_while_eight_threads_call(often_switched, tmp_path):
    model, x = adapted(), torch.randn(5, SIZE, dtype=torch.float64)
    want, stop = outputs_of_each(model, x), threading.Event()
    model.save_pretrained(tmp_path)
    model.set_adapter("BONE")
    names = ["MINI", "__base__", "BAT-COL", "BONE", "MINI"]
    rows = torch.stack([want[name][i] for i, name in enumerate(names)])

    def call() -> int:
        count = 0
        with torch.no_grad():
            while not stop.is_set():
                assert close(model(x, adapter_names=names), rows)
                assert close(model(x), want["BONE"])
                if "guest" in model.peft_config:  # as soon as it can be named it answers, or it has gone again
                    with contextlib.suppress(ConfigError):
                        assert close(model(x, adapter_names=["guest"] * 5), want["ORTHOGONAL"])
                count += 1
        return count

    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(call) for _ in range(THREADS)]
        try:
            for n in range(8):
                model.load_adapter(tmp_path / "ORTHOGONAL", "guest")
                with torch.no_grad():
                    assert close(model(x, adapter_names=["guest"] * 5), want["ORTHOGONAL"])
                model.delete_adapter("guest")
                model.add_adapter(f"new{n}", BoneConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
                model.delete_adapter(f"new{n}")
        finally:
            stop.set()
        assert all(future.result() for future in running)
    assert all(close(got, want[name]) for name, got in outputs_of_each(model, x).items())


def test_the_next_call_is_watched_when_the_last_watch_is_gone(monkeypatch):
    model, x, calls = adapted(), torch.randn(2, SIZE, dtype=torch.float64), []
    stop = ForwardWatch.stop

    def stop_slowly(self):
        if not calls:
            calls.append(threading.Thread(target=lambda: model.train()(x)))
            calls[0].start()
            calls[0].join(0.2)
        stop(self)

    monkeypatch.setattr(ForwardWatch, "stop", stop_slowly)
    model(x)
    calls[0].join()
    layers = [model.base_model.model.first, model.base_model.model.second]
    assert [name for layer in layers for name in ("forward", "on_read") if name in vars(layer)] == []


CHANGES = {
    "set_adapter": lambda model: model.set_adapter("MINI"),
    "merge_adapter": lambda model: model.merge_adapter(),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "set_scale": lambda model: model.base_model.set_scale("BONE", 2.0),
    "delete_adapter": lambda model: model.delete_adapter("MINI"),
    "add_adapter": lambda model: model.add_adapter("new", BoneConfig(r=2, target_modules=["first"])),
    "load_adapter": lambda model: model.load_adapter(model.saved / "BAT-ROW", "again"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_waits_for_a_call_and_is_refused_inside_one(name, tmp_path):
    model, x = adapted(), torch.randn(2, SIZE, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    model.saved = tmp_path
    model.set_adapter("BONE")
    inside, go_on, errors, order = threading.Event(), threading.Event(), [], []

    def stay(module, args):
        if threading.current_thread() is caller:
            inside.set()
            go_on.wait(5)
            order.append("call")

    def change():
        CHANGES[name](model)
        order.append("change")

    model.base_model.model.second.register_forward_pre_hook(stay)
    caller, changer = threading.Thread(target=lambda: model(x)), threading.Thread(target=change)
    caller.start()
    assert inside.wait(5)

    def ask(module, args):
        if threading.current_thread() is threading.main_thread():
            try:
                CHANGES[name](model)
            except ConfigError as error:
                errors.append(str(error))

    handle = model.base_model.model.first.register_forward_pre_hook(ask)
    model(x)
    handle.remove()
    assert [error.partition(":")[0] for error in errors] == [name]
    changer.start()
    time.sleep(0.05)
    assert order == []
    go_on.set()
    caller.join(5)
    changer.join(5)
    assert order == ["call", "change"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_that_would_lose_the_names_in_backward_are_refused(use_reentrant):
    model = adapted({"use_reentrant": use_reentrant}).requires_grad_(True)
    plain = adapted().requires_grad_(True)
    x, names = torch.randn(2, SIZE, dtype=torch.float64, requires_grad=True), ["BONE", "BAT-ROW"]
    with pytest.raises(ConfigError, match=r"adapter_names: torch\.utils\.checkpoint inside the model would run"):
        model(x, adapter_names=names)
    with torch.no_grad():
        assert close(model(x, adapter_names=names), plain(x, adapter_names=names))
    # Around the whole call they are right.
    around = checkpoint(plain, x, use_reentrant=use_reentrant, adapter_names=names) if not use_reentrant else None
    if around is not None:
        want = torch.autograd.grad(plain(x, adapter_names=names).square().sum(), x)[0]
        assert close(torch.autograd.grad(around.square().sum(), x)[0], want)
    model.train().set_adapter("BONE")  # without names they work
    plain.train().set_adapter("BONE")
    grads = []
    for m in (model, plain):
        x.grad = None
        m(x).square().sum().backward()
        grads.append(x.grad)
    assert close(*grads)


def test_an_interrupted_call_leaves_the_model_usable():
    model, x = adapted(), torch.randn(2, SIZE, dtype=torch.float64)
    want = outputs_of_each(model, x)
    model.set_adapter("BONE")

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.base_model.model.second.register_forward_pre_hook(interrupt)
    for names in (["MINI", "MINI"], None):
        with pytest.raises(KeyboardInterrupt):
            model(x, adapter_names=names) if names else model(x)
    handle.remove()
    model.set_adapter("BAT-COL")  # waits for nobody
    assert close(model(x).detach(), want["BAT-COL"])
    assert close(
        model(x, adapter_names=["BONE", "__base__"]).detach(), torch.stack([want["BONE"][0], want["__base__"][1]])
    )


class Shifted(nn.Module):
    """Layers whose weight takes a shifted value for the time of a call: forwards of their own, and a parameter."""

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight * 2, self.bias)

    class Turned(nn.Conv1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv1d(x, self.weight.flip(-1), self.bias)

    class Positions(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(ids + 1, self.weight)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(SIZE, SIZE) / 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.up.mT

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = self.Scaled(SIZE, SIZE), self.Turned(SIZE, SIZE, 1)
        self.table, self.experts = self.Positions(9, SIZE), self.Experts()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.table(ids))
        return self.experts(self.conv(x.mT).mT)


def test_layers_that_shift_their_weight_take_the_calls_of_threads_in_turn(often_switched):
    torch.manual_seed(0)
    config = BoneConfig(
        r=3, target_modules=["linear", "conv", "table"], target_parameters=["experts.up"], init_weights=False
    )
    model = get_peft_model(Shifted().double(), config, adapter_name="a")
    fill_blocks(model)
    model.eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad():
        want = model(ids)
        with model.disable_adapter():
            bare = model(ids)

    def run(seed: int) -> int:
        wrong = 0
        with torch.no_grad():
            for n in range(40):
                got = model(ids, adapter_names=["__base__"] * 2) if (n + seed) % 3 == 0 else model(ids)
                wrong += not close(got, bare if (n + seed) % 3 == 0 else want)
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(run, range(THREADS))) == 0
    assert all(same_bits(p, weights[name], Promise.UNTOUCHED) for name, p in model.named_parameters())
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert close(other(ids).detach(), want)
