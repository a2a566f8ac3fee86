"""The kernels of a piece of work, counted on paper, and the times that a device would need for them."""

import pytest
import torch
from benchmarks.__main__ import main
from benchmarks.cases import FROZEN, Setting
from benchmarks.methods import CURRENT, load_hosts
from benchmarks.roofline import work
from benchmarks.roofline.devices import GPUS, Device
from benchmarks.roofline.kernels import Kernel, KernelLog, fused, more
from torch._subclasses.fake_tensor import FakeTensorMode

load_hosts(CURRENT)
TOKENS, IN, OUT, R = 32, 64, 96, 16
BASE = 2 * 2 * TOKENS * IN * OUT  # operations of forward, and of backward to x
SIZES = (TOKENS, IN, OUT, "float32")


def operations(kernels) -> float:
    return sum(kernel.operations for kernel in kernels)


def test_a_frozen_layer_is_two_products_which_read_their_factors_and_write_their_results_once():
    kernels = work.layer(FROZEN, *SIZES)
    assert [kernel.name for kernel in kernels] == ["mm", "mm"]
    assert operations(kernels) == BASE
    assert sum(kernel.bytes for kernel in kernels) == 2 * 4 * (TOKENS * IN + IN * OUT + TOKENS * OUT)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("bone", 3 * 2 * TOKENS * R * OUT),  # S(x) B, and its two gradients
        ("bat-row", 3 * 2 * TOKENS * R * IN),  # z = x D^T, and its two gradients
        # W' twice, its gradient, and that of the blocks.
        ("bat-col", 2 * TOKENS * IN * OUT + 3 * 2 * IN * OUT * R),
        ("lora", 3 * 2 * TOKENS * (R // 2) * (IN + OUT)),
    ],
)
def test_the_operations_of_a_method_are_those_of_its_formula(method, extra):
    assert operations(work.layer(Setting(method, R), *SIZES)) == BASE + extra


def test_a_view_is_no_kernel_and_an_expanded_tensor_is_read_once():
    with FakeTensorMode():
        x = torch.empty(4, 8)
        with KernelLog() as log:
            _ = x.view(8, 4).mT + torch.empty(1, 8).expand(4, 8)
    (kernel,) = log.kernels
    assert kernel.bytes == 4 * (4 * 8 + 8 + 4 * 8)


def test_what_is_fused_is_neither_written_nor_read_between():
    with FakeTensorMode():
        x = torch.empty(4, 8)
        with KernelLog() as log:
            ((x + 1).relu() * 2) @ torch.empty(8, 8)
    assert [kernel.name for kernel in log.kernels] == ["add", "relu", "mul", "mm"]
    pointwise, product = fused(log.kernels)
    assert pointwise.bytes == 2 * 4 * 4 * 8
    assert product is log.kernels[-1]


def test_what_a_method_launches_more_is_named():
    found = {
        name: (launches, size)
        for name, launches, size in more(work.layer(Setting("bone", R), *SIZES), work.layer(FROZEN, *SIZES))
    }
    assert found["addmm"][0] == 1
    assert found["sum"] == (1, 4 * TOKENS * (IN + R))


def test_a_kernel_takes_what_it_needs_most():
    device = Device("d", {"float32": 1e9}, ((1e3, 1e6), (1e9, 1e5)), launch_s=1e-4)
    kernel = Kernel("mm", {0: 500}, {1: 500}, 2e6, "float32")
    assert device.time_s(kernel) == pytest.approx(2e-3)  # operations
    assert device.time_s(Kernel("add", {0: 500}, {1: 500}, 0, "float32")) == pytest.approx(1e-3)  # from a cache
    assert device.time_s(Kernel("add", {0: 500}, {1: 501}, 0, "float32")) == pytest.approx(1.001e-2)  # from memory
    assert device.time_s(Kernel("add", {0: 4}, {1: 4}, 0, "float32")) == 1e-4  # the launch
    assert all(device.operations_per_s["bfloat16"] > device.operations_per_s["float32"] for device in GPUS.values())


@pytest.mark.slow
def test_a_step_is_predicted_and_says_so(capsys, tmp_path):
    work.config_of("someone/tiny").save_pretrained(tmp_path)
    arguments = ["--gpu", "l4", "--tokens", "64", "--r", "16", "--methods", "bat-col,oft"]
    assert main(["roofline", "--model", str(tmp_path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(f"{part} of {tmp_path.name}, ") for part in ("layer", "block", "step")] == [1, 1, 1]
    assert printed.count("PREDICTED for L4") == 3
    assert printed.count("PEFT OFT") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-9"], "no folder with a config.json, and none of tiny"),
        (["--gpu", "b900"], "got b900, wanted cpu or one of a100"),
        (["--methods", "bone,bune"], "got bune, wanted some of frozen, bone"),
    ],
)
def test_what_cannot_be_predicted_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["roofline", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
