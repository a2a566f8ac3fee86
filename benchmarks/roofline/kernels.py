"""The kernels of a piece of work, noted while it runs on tensors without numbers: what each reads, writes, computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.on_paper import storage

# They make room and compute nothing.
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_assert_async",
    "_local_scalar_dense",
}
# They read as much of a table as they write.
_LOOK_UP = {"embedding", "index_select", "gather", "index"}


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: The operation.
        reads, writes: Storage -> bytes.
        operations: Floating-point, of products.
        dtype: Of its result.
    """

    name: str
    reads: dict[int, int]
    writes: dict[int, int]
    operations: float
    dtype: str

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


class KernelLog(TorchDispatchMode):
    """Notes every kernel that runs within it. flashbone's operators are taken apart into their operations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        # So that no other storage gets the identity of one that is noted. Not the tensors: autograd copies a gradient
        # that somebody else holds.
        self._held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "flashbone":
            with self:
                return OPDEFS[f"flashbone::{func._opname}"]._init_fn(*args, **kwargs)
        if func.namespace != "aten":
            return func(*args, **kwargs)
        with self:  # below autograd, operations that consist of others arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        known = {storage(tensor) for tensor in inputs}
        is_writing = func._schema.is_mutable
        if func._opname in _NO_KERNEL or (not is_writing and all(storage(tensor) in known for tensor in outputs)):
            return
        written = _written(func, args, kwargs) if is_writing else outputs
        writes = {storage(tensor): _touched(tensor) for tensor in written}
        reads = {storage(tensor): _touched(tensor) for tensor in inputs}
        if func._opname in _LOOK_UP:
            reads = {key: min(size, sum(writes.values())) for key, size in reads.items()}
        if func._opname in ("copy_", "fill_", "zero_"):
            reads = {key: size for key, size in reads.items() if key not in writes}
        count = flop_registry.get(func.overloadpacket)
        operations = count(*args, **kwargs, out_val=result) if count else 0.0
        dtype = str((written or inputs)[0].dtype).removeprefix("torch.") if written or inputs else ""
        self.kernels.append(Kernel(func._opname, reads, writes, operations, dtype))
        self._held += [tensor.untyped_storage() for tensor in (*inputs, *outputs)]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What an operation writes to, of its arguments."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(kwargs.get(argument.name) if argument.name in kwargs or place >= len(args) else args[place])
    return _tensors(written)


def _touched(tensor: Tensor) -> int:
    """Bytes of the entries that differ in place: an expanded axis counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.itemsize


def fused(kernels: list[Kernel]) -> list[Kernel]:
    """An estimate of what a compiler makes of them: a run of kernels without products becomes one, which reads what it
    did not make and writes what is read after it."""
    last_read: dict[int, int] = {}
    for place, kernel in enumerate(kernels):
        last_read.update(dict.fromkeys(kernel.reads, place))
    made: list[Kernel] = []
    run: list[int] = []
    for place, kernel in enumerate(kernels):
        if kernel.operations:
            made += _one(kernels, run, last_read)
            made.append(kernel)
            run = []
        else:
            run.append(place)
    return made + _one(kernels, run, last_read)


def _one(kernels: list[Kernel], run: list[int], last_read: dict[int, int]) -> list[Kernel]:
    if not run:
        return []
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for place in run:
        for key, size in kernels[place].reads.items():
            if key not in writes:
                reads[key] = max(size, reads.get(key, 0))
        writes.update(kernels[place].writes)
    end = run[-1]
    # What nobody reads later is a result: a gradient, a loss.
    lasting = {key: size for key, size in writes.items() if last_read.get(key, end + 1) > end}
    return [Kernel("fused", reads, lasting, 0.0, kernels[end].dtype)]


def more(kernels: Iterable[Kernel], base: Iterable[Kernel]) -> Iterator[tuple[str, int, float]]:
    """Of each operation that one piece of work has more of than another: its name, launches and bytes."""
    launches, moved = Counter[str](), Counter[str]()
    for sign, group in ((1, kernels), (-1, base)):
        for kernel in group:
            launches[kernel.name] += sign
            moved[kernel.name] += sign * kernel.bytes
    for name, size in sorted(moved.items(), key=lambda item: -abs(item[1])):
        if launches[name] or size:
            yield name, launches[name], size
