"""Random sequences of everything that changes a model, with threads that call it: outputs are always those of an oracle
that adds up dense weights."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import BoneConfig, get_peft_model
from torch import Tensor, nn

from helpers.blocks import VARIANT_NAMES
from helpers.comparison import close
from helpers.layers import oracle_weight

SIZE, STEPS = 6, 12
X = torch.linspace(-1, 1, 4 * SIZE, dtype=torch.float64).view(4, SIZE)

pytestmark = pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")


class Oracle:
    """What the model is to compute, from its blocks, and from a state of its own."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        base = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE)).double()
        self.bases = {name: (base[name].weight.detach().clone(), base[name].bias.detach().clone()) for name in (0, 2)}
        self.variants, self.scales, self.active, self.enabled = {}, {}, ["a0"], True
        self.merged: dict | None = None  # the weights of layers while merged
        self.model = get_peft_model(base, self._config("a0"), adapter_name="a0").eval()
        self._fill("a0")

    def _config(self, name: str) -> BoneConfig:
        self.variants[name], self.scales[name] = self.random.choice(VARIANT_NAMES), 1.0
        dropout = self.random.choice([0.0, 0.5])
        return BoneConfig(r=3, mini_r=2, variant=self.variants[name], target_modules=["0", "2"], dropout=dropout)

    def _layers(self):
        return {n: self.model.base_model.model[n] for n in (0, 2)}

    def _fill(self, name: str) -> None:
        for layer in self._layers().values():
            block = layer.bone_block[name]
            block.data = torch.randn(block.shape, dtype=block.dtype) / 2

    def weights(self, names: list[str]) -> dict[int, Tensor]:
        """Of each layer with these adapters."""
        summed = {}
        for n, layer in self._layers().items():
            W = self.bases[n][0].double()
            deltas = [self.scales[a] * (oracle_weight(W, self.variants[a], layer.bone_block[a]) - W) for a in names]
            summed[n] = W + sum(deltas)
        return summed

    def output(self, names: list[str] | None = None) -> Tensor:
        """For X: of the state, or of these adapters."""
        if names is None:
            names = self.active if self.enabled else []
            weights = self.weights(names) if self.merged is None else self.merged
        else:
            weights = self.weights(names if self.enabled else [])
        hidden = (X @ weights[0].T + self.bases[0][1].double()).tanh()
        return hidden @ weights[2].T + self.bases[2][1].double()

    def add(self) -> None:
        name = f"a{len(self.variants)}"
        self.model.add_adapter(name, self._config(name))  # unmerges, as PEFT warns
        self.merged = None
        self.model.eval()
        self._fill(name)

    def delete(self) -> None:
        names = [name for name in self.scales if name not in self.active]
        if names and self.merged is None:
            self.model.delete_adapter(name := self.random.choice(names))
            del self.scales[name]

    def set_adapter(self) -> None:
        count = self.random.randint(1, min(3, len(self.scales)))
        names = self.random.sample(list(self.scales), count)
        self.model.base_model.set_adapter(names)
        self.active, self.merged = names, None

    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self.enabled, self.merged = False, None

    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.enabled = True

    def merge(self) -> None:
        if self.enabled and self.merged is None:
            self.model.merge_adapter()
            self.merged = self.weights(self.active)

    def unmerge(self) -> None:
        if self.merged is not None:
            self.model.unmerge_adapter()
            self.merged = None

    def scale(self) -> None:
        name, scale = self.random.choice(list(self.scales)), self.random.choice([-1.0, 0.5, 2.0])
        self.model.base_model.set_scale(name, scale)
        self.scales[name] = scale

    def train_and_evaluate(self) -> None:
        """A step under dropout, in place as optimisers do."""
        if self.enabled and self.merged is None:
            self.model.train()(X.to(self._dtype())).square().sum().backward()
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.data -= 0.01 * parameter.grad
                    parameter.grad = None
            self.model.eval()

    def move(self) -> None:
        if self.merged is None:
            dtype = self.random.choice([torch.float32, torch.float64])
            self.model.to(dtype)
            self.bases = {n: (W.to(dtype), b.to(dtype)) for n, (W, b) in self.bases.items()}

    def _dtype(self) -> torch.dtype:
        return self.model.base_model.model[0].get_base_layer().weight.dtype

    @torch.no_grad()
    def call(self, names: list[str] | None = None) -> Tensor:
        more = {} if names is None else {"adapter_names": names}
        return self.model(X.to(self._dtype()), **more).double()


ATOMIC = (
    "set_adapter",
    "disable",
    "enable",
    "merge",
    "unmerge",
    "scale",
)  # a call of another thread sees all or nothing
OPERATIONS = (*ATOMIC, "add", "delete", "train_and_evaluate", "move")


@pytest.mark.parametrize("seed", range(6))
def test_outputs_after_and_during_every_operation_are_those_of_dense_weights(seed):
    oracle = Oracle(seed)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(STEPS):
            operation, before = oracle.random.choice(OPERATIONS), oracle.output().detach()
            if operation in ATOMIC:
                stop = threading.Event()
                calls = [pool.submit(_calls_until, stop, oracle) for _ in range(3)]
                try:
                    getattr(oracle, operation)()
                finally:
                    stop.set()
                outputs = [y for call in calls for y in call.result()]
            else:
                getattr(oracle, operation)()
                outputs = []
            want = oracle.output().detach()
            assert all(min((y - z).abs().max() for z in (before, want)) < 1e-4 for y in outputs), operation
            assert close(oracle.call(), want, torch.float32), operation
            if oracle.merged is None:
                rows = [*oracle.random.choices(list(oracle.scales), k=3), "__base__"]
                each = [oracle.output([] if name == "__base__" else [name])[i] for i, name in enumerate(rows)]
                for got in pool.map(oracle.call, [rows] * 3):
                    assert close(got, torch.stack(each).detach(), torch.float32), (operation, rows)


def _calls_until(stop: threading.Event, oracle: Oracle) -> list[Tensor]:
    outputs = [oracle.call()]
    while not stop.is_set():
        outputs.append(oracle.call())
    return outputs
