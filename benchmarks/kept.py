"""What backward keeps: every storage that autograd saves in a forward pass, counted once, beside what a method's
gradients cannot do without. Counted on tensors without numbers, so for any size and in any dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.cases import FROZEN, Case, Setting
from benchmarks.methods import METHODS, adapted
from benchmarks.models import LINEARS, load_model, quantize
from benchmarks.on_paper import on_paper, storage

MIB = 2**20
CHECKPOINTING, FOUR_BIT = "checkpointing", "4-bit"


class KeptSubject:
    """One forward pass of a language model on paper, with the loss."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.base = Kept(case, FROZEN)

    def prepare(self, setting: Setting) -> Callable[[], dict[str, float]]:
        """Its figures, the same at every call: what the whole model keeps; what the adapters' gradients need of what
        the base does not keep; and what is kept beside the base's, by kind."""
        found = self.base if setting == FROZEN else Kept(self.case, setting)
        figures = {"kept": found.bytes}
        if setting != FROZEN:
            base_keeps = {name for name, x in self.base.inputs.items() if storage(x) in self.base.saved}
            inputs = {storage(x): x for name, x in found.inputs.items() if name not in base_keeps}
            # A checkpointed block is computed again in backward, where one block at a time keeps these.
            needed = 0 if self.case.shape["base"] == CHECKPOINTING else needed_bytes(setting, found, inputs)
            figures |= {"needed": needed, **found.kinds(self.base, inputs, setting)}
        return lambda: {f"{name}_mib": value / MIB for name, value in figures.items()}


class Kept:
    """What a forward pass kept.

    Attributes:
        saved: Identity -> tensor, of each storage that autograd saved; without parameters and buffers.
        inputs: Name of an adapted layer -> its input.
        blocks: Entries of every tensor that is trained.
    """

    def __init__(self, case: Case, setting: Setting) -> None:
        self.saved: dict[int, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        size = case.shape["batch"], case.shape["seq"]
        is_quantized = case.shape["base"] == FOUR_BIT
        base = load_model(case.shape["model"], case.base_dtype, "cpu" if is_quantized else "meta")
        if is_quantized:
            quantize(base)
        names = {child: name for name, child in base.named_modules() if name.endswith(tuple(LINEARS))}
        with ExitStack() as stack:
            quantized = adapted(base, setting, LINEARS).train() if is_quantized else None
            model = quantized or stack.enter_context(on_paper(base, setting, LINEARS))
            # The same for all, or the first block would keep more in a frozen model.
            model.enable_input_require_grads()
            if case.shape["base"] == CHECKPOINTING:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            weights = {storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
            self.blocks = {p.numel() for p in model.parameters() if p.requires_grad}
            # Hooks of all modules: a layer with hooks of its own may be called in another way.
            stack.enter_context(nn.modules.module.register_module_forward_pre_hook(self._note_input(names)))
            tokens = torch.zeros(size, dtype=torch.long)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=case.is_autocast),
                saved_tensors_hooks(self._note, _same),
            ):
                model(input_ids=tokens, labels=tokens)
            self.saved = {key: tensor for key, tensor in self.saved.items() if key not in weights}
        self.tokens = case.shape["batch"] * case.shape["seq"]

    def _note(self, tensor: Tensor) -> Tensor:
        self.saved[storage(tensor)] = tensor
        return tensor

    def _note_input(self, names: dict[nn.Module, str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inner = getattr(module, "base_layer", module)
            if inner in names:
                self.inputs.setdefault(names[inner], arguments[0])

        return note

    @property
    def bytes(self) -> int:
        """Of all that was saved."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.saved.values())

    def kinds(self, base: Kept, inputs: dict[int, Tensor], setting: Setting) -> Counter[str]:
        """Bytes that a `base` without adapters does not keep: of `inputs`, of `sums` (for each token r numbers, or
        LoRA's rank), of copies of `blocks`, and of `others`."""
        narrow = {self.tokens * setting.r, self.tokens * max(setting.r // 2, 1)}
        of_base = Counter(_size(tensor) for tensor in base.saved.values())
        found: Counter[str] = Counter(inputs=0, sums=0, blocks=0, others=0)
        for key, tensor in self.saved.items():
            size = _size(tensor)
            entries = size[0] // tensor.itemsize
            if key in inputs:
                found["inputs"] += size[0]
            elif of_base[size]:
                of_base[size] -= 1
            else:
                kind = "sums" if entries in narrow else "blocks" if entries in self.blocks else "others"
                found[kind] += size[0]
        return found


def needed_bytes(setting: Setting, kept: Kept, inputs: dict[int, Tensor]) -> int:
    """What the gradients of a method are made of, in the dtype of the layers' inputs; what layers share counts once.

    Bone's gradient is a product with S(x), so r numbers a token; where a block meets every shard of x, all of x is
    needed, and LoRA needs x and what its first factor makes of it.
    """
    every = {storage(x): x for x in kept.inputs.values()}
    whole = sum(x.nbytes for x in inputs.values())
    sums = kept.tokens * sum(x.itemsize for x in every.values())
    inner = kept.tokens * sum(x.itemsize for x in kept.inputs.values()) * max(setting.r // 2, 1)
    return {"sum": sums * setting.r, "input": whole, "input and inner": whole + inner}[METHODS[setting.method].needs]


def _size(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().nbytes(), tensor.dtype


def _same(tensor: Tensor) -> Tensor:
    return tensor
