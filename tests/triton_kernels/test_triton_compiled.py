"""Every kernel compiled ahead for sm_80 and sm_90, as it would be launched: it fits the device and spills nothing.

No GPU is needed. In the interpreter nothing is compiled, hence `make test-triton` runs pytest twice.
"""

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed here; `make test-triton` brings it")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashbone.errors import BackendError
from flashbone.ops.triton import kernels, launch, shard_sum, shift_input

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET is set: kernels are not compiled")

# Compute capability -> bytes of shared memory that a block may ask for.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compiled(kernel, config: dict, dtype: torch.dtype, arch: int, **constants):
    """The kernel as a launch with `config` compiles it, with sizes and strides that 16 divides."""
    options = {name: value for name, value in config.items() if name in OPTIONS}
    constants |= {name: value for name, value in config.items() if name not in OPTIONS}
    signature = {name: POINTERS[dtype] if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] != "constexpr"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of local memory a thread, which is where registers are spilled to."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout.split()
    return sum(int(field.partition(":")[2]) for field in usage if field.startswith(("STACK:", "LOCAL:")))


def check(kernel, arch: int, folder: Path) -> None:
    assert kernel.asm["cubin"]
    assert f".target sm_{arch}" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert stack_bytes(kernel.asm["cubin"], folder) == 0


# The three ways in which the kernel is launched: forward, backward beside an own base, backward of `base_x is x`. The
# blocks are transposed in forward, and one of their strides is 1.
LAUNCHES = {"forward": (True, False), "backward": (False, True), "fused backward": (True, True)}


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("way", LAUNCHES)
@pytest.mark.parametrize("r", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_shift_compiles(arch, dtype, r, way, with_sum, tmp_path):
    has_base, takes_sum = LAUNCHES[way]
    forward = way == "forward"
    config = launch.shift_config(8192, r, dtype, has_base, takes_sum and with_sum, forward and with_sum)
    present = {"base_ptr": has_base, "broadcast_ptr": takes_sum and with_sum, "sum_ptr": forward and with_sum}
    absent = {name: None for name, is_there in present.items() if not is_there}
    unit_stride = {"block_k" if forward else "block_j": 1}
    check(compiled(kernels.shift_kernel, config, dtype, arch, **absent, **unit_stride), arch, tmp_path)


@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("dtype", list(POINTERS))
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_shift_of_few_tokens_of_large_blocks_and_of_fp64_compiles(arch, dtype, tokens, tmp_path):
    config = launch.shift_config(tokens, 1024, dtype, True, False, True)
    kernel = compiled(kernels.shift_kernel, config, dtype, arch, broadcast_ptr=None, block_k=1)
    check(kernel, arch, tmp_path)


@pytest.fixture(params=[False, True], ids=["exact", "tf32"])
def tf32_allowed(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_products_of_fp32_are_exact_unless_torch_allows_tf32(arch, tf32_allowed):
    config = launch.shift_config(8192, 64, torch.float32, True, False, True)
    kernel = compiled(kernels.shift_kernel, config, torch.float32, arch, broadcast_ptr=None, block_k=1)
    assert (".tf32" in kernel.asm["ptx"]) == tf32_allowed


@pytest.mark.parametrize("r", [1, 16, 64, 100, 128, 256])
@pytest.mark.parametrize("dtype", list(POINTERS))
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_shard_sum_compiles(arch, dtype, r, tmp_path):
    config = launch.shard_sum_config(4096, r, 1, dtype)
    check(compiled(kernels.shard_sum_kernel, config, dtype, arch), arch, tmp_path)


@pytest.mark.parametrize("r", [64, 128, 256])
def test_shard_sums_read_sixteen_bytes_at_once(r):
    kernel = compiled(kernels.shard_sum_kernel, launch.shard_sum_config(4096, r, 1, torch.bfloat16), torch.bfloat16, 80)
    assert "ld.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize(
    ("changed", "spills", "fits"),
    [({}, False, True), ({"BLOCK_M": 128, "num_warps": 4}, True, True), ({"num_stages": 17}, False, False)],
    ids=["as launched", "too few warps", "too many stages"],
)
def test_the_limits_tell_good_launches_from_bad_ones(changed, spills, fits, tmp_path):
    config = launch.shift_config(8192, 128, torch.bfloat16, True, False, True) | changed
    kernel = compiled(kernels.shift_kernel, config, torch.bfloat16, 80, broadcast_ptr=None, block_k=1)
    assert (stack_bytes(kernel.asm["cubin"], tmp_path) > 0) == spills
    assert (kernel.metadata.shared <= SHARED_MEMORY[80]) == fits


def test_tensors_on_the_cpu_are_refused_outside_the_interpreter():
    x = torch.randn(3, 8)
    with pytest.raises(BackendError, match="run on a GPU, got a tensor on cpu"):
        shard_sum(x, 4)
    with pytest.raises(BackendError, match="run on a GPU, got a tensor on cpu"):
        shift_input(x, x, torch.randn(2, 4, 4), 1.0)
