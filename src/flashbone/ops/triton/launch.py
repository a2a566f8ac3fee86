"""The kernels as differentiable functions: shapes checked, tensors flattened to rows, launches sized.

Their twins in plain torch are `ops.bone.bounded_sum` and `ops.bat_row.shift_input`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from flashbone import shards
from flashbone.errors import BackendError, ShapeError
from flashbone.ops.triton import kernels

INTERPRETED = not isinstance(kernels.shift_kernel, triton.JITFunction)
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def shard_sum(x: Float[Tensor, "*batch in"], r: int, divisor: int = 1) -> Float[Tensor, "*batch r"]:
    """`S(x) / divisor`: the sum of all shards in one pass over x, accumulated in fp32 (fp64 for fp64), rounded once to
    x's dtype.

    A power of two as divisor keeps sums of fp16 in range. Autograd keeps nothing; the gradient is tiled in plain torch.

    Raises:
        BackendError: x is on no GPU, or of a dtype that the kernel does not know.
        ShapeError: r or the divisor is not positive.
    """
    shards.count(x.shape[-1], r)
    if divisor < 1:
        raise ShapeError(f"shard_sum: the divisor must be positive, got {divisor}")
    _check_runnable(x)
    return _ShardSum.apply(x, r, divisor)


def shift_input(
    base_x: Float[Tensor, "*batch in"],
    x: Float[Tensor, "*batch in"],
    D: Float[Tensor, "n_in r r"],
    scale: float,
    with_sum: bool = True,
) -> tuple[Float[Tensor, "*batch in"], Float[Tensor, "*batch r"] | None]:
    """`base_x + scale * z`, and `scale * sum_b z_b` (None if not `with_sum`), with `z_b = x_b D_b^T`.

    z is never written. Products run in x's dtype, under autocast too, and accumulate in fp32 (fp64 for fp64); both
    results, in the dtypes of base_x and x, are rounded once. D may be one block expanded over the shards. Autograd
    keeps x and D; D's gradient arrives in its own dtype. Where `base_x is x`, the kernel adds their gradients.

    Raises:
        BackendError: a tensor is on no GPU, or of a dtype that the kernel does not know.
        ShapeError: the sizes of base_x, x and D do not fit.
    """
    r = D.shape[-1]
    wanted = (shards.count(x.shape[-1], r), r, r)
    if base_x.shape != x.shape or D.shape != wanted:
        raise ShapeError(
            f"shift_input: got x {tuple(x.shape)}, base_x {tuple(base_x.shape)} and D {tuple(D.shape)}; "
            f"wanted base_x as x, and D of {wanted}, that is ceil(in / r) blocks; was r changed?"
        )
    for tensor in (base_x, x, D):
        _check_runnable(tensor)
    return _ShiftInput.apply(None if base_x is x else base_x, x, D, scale, with_sum)


class _ShardSum(Function):
    """Linear, so that only sizes are kept; its backward is differentiable."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, r, divisor):
        ctx.size, ctx.divisor = x.shape[-1], divisor  # pyright: ignore[reportAttributeAccessIssue]
        rows = _rows(x)
        result = x.new_empty(rows.shape[0], r)
        config = shard_sum_config(rows.shape[1], r, divisor, x.dtype)
        grid = (rows.shape[0], shards.count(r, config["BLOCK_R"]))
        n_in = shards.count(rows.shape[1], r)
        _launch(kernels.shard_sum_kernel, grid, (rows, result, rows.shape[1], r, n_in, rows.stride(0)), config)
        return result.view(*x.shape[:-1], r)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return shards.tile(grad if ctx.divisor == 1 else grad / ctx.divisor, ctx.size), None, None


class _ShiftInput(Function):
    """With `G_b = g_b + g_sum`: `dx_b = scale G_b D_b`, by the same kernel, and `dD_b = scale G_b^T x_b`."""

    @staticmethod
    def forward(ctx: FunctionCtx, base_x, x, D, scale, with_sum):
        ctx.save_for_backward(x, D)
        ctx.scale, ctx.has_base = scale, base_x is not None  # pyright: ignore[reportAttributeAccessIssue]
        base_x = x if base_x is None else base_x
        return _run_shift(x, base_x, _scaled(D, scale, x.dtype).mT, None, with_sum, x.dtype, base_x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_sum):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, D = ctx.saved_tensors
        need_base, need_x, need_D, _, _ = ctx.needs_input_grad
        grad_x = grad_D = None
        if need_x:
            base = None if ctx.has_base else grad
            grad_x, _ = _run_shift(grad, base, _scaled(D, ctx.scale, x.dtype), grad_sum, False, x.dtype, x.dtype)
        if need_D:
            with torch.autocast(x.device.type, enabled=False):
                g, inputs = (t.to(x.dtype).reshape(-1, x.shape[-1]) for t in (grad, x))
                g_sum = None if grad_sum is None else grad_sum.reshape(-1, D.shape[-1])
                grad_D = (_block_grad(g, g_sum, inputs, D.shape[-1]) * ctx.scale).to(D.dtype)
        return grad if need_base else None, grad_x, grad_D, None, None


def _block_grad(
    grad: Float[Tensor, "tokens in"], grad_sum: Float[Tensor, "tokens r"] | None, x: Float[Tensor, "tokens in"], r: int
) -> Float[Tensor, "n_in r r"]:
    """`dD_b = (g_b + g_sum)^T x_b`, as `g_b^T x_b` and one GEMM `g_sum^T x`: `g_b + g_sum` is never formed."""
    (grads, grad_tail), (inputs, tail) = shards.full_and_tail(grad, r), shards.full_and_tail(x, r)
    result = torch.bmm(grads.permute(1, 2, 0), inputs.transpose(0, 1))
    if missing := -x.shape[-1] % r:
        result = torch.cat([result, F.pad(grad_tail.mT @ tail, (0, missing, 0, missing)).unsqueeze(0)])
    return result if grad_sum is None else result + shards.split(grad_sum.mT @ x, r).transpose(0, 1)


def _run_shift(
    x: Tensor,
    base: Tensor | None,
    blocks: Tensor,
    broadcast: Tensor | None,
    with_sum: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """`base + z` in `out_dtype` and `sum_b z_b` in `dtype`, with `z_b = (x_b + broadcast) blocks[b]`."""
    rows = _rows(x)
    base_rows = rows if base is x else None if base is None else _rows(base)
    broadcast = None if broadcast is None else _rows(broadcast).contiguous()
    (tokens, in_features), (n_in, r, _) = rows.shape, blocks.shape
    shifted = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    z_sum = torch.empty(*x.shape[:-1], r, dtype=dtype, device=x.device) if with_sum else None
    config = shift_config(tokens, r, dtype, base is not None, broadcast is not None, with_sum)
    grid = (-(-tokens // config["BLOCK_M"]) * shards.count(r, config["BLOCK_J"]),)
    base_row = 0 if base_rows is None else base_rows.stride(0)
    sizes = (tokens, in_features, r, n_in, rows.stride(0), base_row, *blocks.stride())
    _launch(kernels.shift_kernel, grid, (rows, base_rows, blocks, broadcast, shifted, z_sum, *sizes), config)
    return shifted, z_sum


def shard_sum_config(in_features: int, r: int, divisor: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a launch. A program of four warps reads 2048 entries of a row at once, 16 a thread."""
    block_r = min(_power_of_2(r), 1024)
    block_n = min(_power_of_2(shards.count(in_features, r)), 2048 // block_r)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return {
        "DIVISOR": divisor,
        "ACC": acc,
        "BLOCK_N": block_n,
        "BLOCK_R": block_r,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def shift_config(
    tokens: int, r: int, dtype: torch.dtype, has_base: bool, has_broadcast: bool, with_sum: bool
) -> dict[str, Any]:
    """Constants of a launch, so chosen that z and its sum stay in registers and the operands in shared memory.

    Products of fp32 are exact ("ieee") unless torch's own are allowed to be tf32: a backend must not change what a user
    chose. In the interpreter bf16 is multiplied as fp32, which is what its products are, because numpy knows no bf16.
    """
    padded = max(16, _power_of_2(r))
    block_j = min(padded, 256 // dtype.itemsize)
    # A whole shard where it is small, so that its loop is the only one; else small steps, for the sake of registers.
    block_k = padded if padded * dtype.itemsize <= 128 else min(32, 128 // dtype.itemsize)
    # As many tokens a program as leave some hundred programs, about one for each multiprocessor.
    block_m = max(16, min(128 // dtype.itemsize, _power_of_2(max(1, tokens // 128))))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return {
        "HAS_BASE": has_base,
        "HAS_BROADCAST": has_broadcast,
        "WITH_SUM": with_sum,
        "COMPUTE": DTYPES[dtype],
        "DOT": tl.float32 if INTERPRETED and dtype == torch.bfloat16 else DTYPES[dtype],
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
        "CHUNKS": shards.count(r, block_k),
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "BLOCK_J": block_j,
        "num_warps": 4 if block_j <= 64 else 8,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, config: dict[str, Any]) -> None:
    """Run the kernel on the device of its first argument; an empty grid is no launch."""
    if math.prod(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **config)


def _power_of_2(n: int) -> int:
    """The smallest power of two that is no smaller than n."""
    return 1 << (n - 1).bit_length()


def _rows(x: Float[Tensor, "*batch k"]) -> Float[Tensor, "tokens k"]:
    """x as rows of adjacent entries. Batch axes that one stride covers are taken as they are; anything else is copied,
    because reads across rows would cost more than the copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _scaled(D: Float[Tensor, "n_in r r"], scale: float, dtype: torch.dtype) -> Float[Tensor, "n_in r r"]:
    """`scale * D` in the dtype of the product; of an expanded block, one block is cast and expanded again."""
    blocks = D[:1] if D.stride(0) == 0 else D
    return (blocks if scale == 1 else blocks * scale).to(dtype).expand(D.shape)


def _check_runnable(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise BackendError(f"backend 'triton': the kernels take {known}, got {tensor.dtype}; cast the tensor")
    if not (tensor.is_cuda or INTERPRETED):
        raise BackendError(
            f"backend 'triton': the kernels run on a GPU, got a tensor on {tensor.device}; move the model to a GPU, or "
            "use the backend 'torch'"
        )
