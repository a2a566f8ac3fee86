"""Shared by all tests: shapes are checked at run time, models come from disk only, and each tier keeps to its time."""

import contextlib
import gc
import importlib
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

CHECKED = ["shards", "variants", "ops", "rwkv.wkv6", "rwkv.wkv7", "rwkv.chunks", "rwkv.shift", "rwkv.loss"]
install_import_hook([f"flashbone.{name}" for name in CHECKED], "beartype.beartype")

import pytest
import torch

import flashbone  # noqa: F401  (so that `from peft import BoneConfig` works in files whose imports are sorted)

STARTED = pytest.StashKey[tuple[float, float]]()
ENVIRONMENT = pytest.StashKey[dict[str, str]]()
# What pytest, a fixture of the whole session, the command, Inductor, lm-evaluation-harness and DeepSpeed set for good.
SETTLED = {"PYTEST_CURRENT_TEST", "HF_DATASETS_CACHE", "HF_HUB_DISABLE_TELEMETRY", "TORCHINDUCTOR_CACHE_DIR"}
SETTLED |= {"_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
SETTLED |= {"HF_XET_HIGH_PERFORMANCE", "PYTORCH_NVML_BASED_CUDA_CHECK"}
HEAVY = ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "datasets", "diffusers", "torch._dynamo", "sympy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--most-seconds", type=float, help="fail a test of the first tier that works for longer")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("beside"):
        item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that no worker begins a long one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def clocks() -> tuple[float, float]:
    """CPU seconds of this process and of the children that it waited for, and seconds of the clock.

    Other programs stretch the second, and children of earlier tests may end in the first: the smaller one counts.
    """
    return sum(os.times()[:4]), time.monotonic()


def is_timed(item: pytest.Item) -> bool:
    return item.config.getoption("--most-seconds") is not None and not item.get_closest_marker("slow")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import what takes seconds before tests are timed: which test would be the first to import it is luck."""
    if session.config.getoption("--most-seconds") is not None and session.items:
        for name in HEAVY:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # each training collects garbage, and what is imported, 0.3 s' worth, is none


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[ENVIRONMENT] = dict(os.environ)
    if is_timed(item):
        item.stash[STARTED] = clocks()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item):
    result = yield
    if is_timed(item):
        took = min(now - then for now, then in zip(clocks(), item.stash[STARTED], strict=True))
        most = item.config.getoption("--most-seconds")
        if took > most:
            pytest.fail(f"worked for {took:.1f} s, {most:g} at most: make it faster, or mark it slow", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item):
    """A variable that a test leaves behind changes what later tests, and the processes that they start, do."""
    result = yield
    changed = {name for name, _ in os.environ.items() ^ item.stash[ENVIRONMENT].items()} - SETTLED
    if changed:
        pytest.fail(f"left the environment changed: {', '.join(sorted(changed))}", pytrace=False)
    return result


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
