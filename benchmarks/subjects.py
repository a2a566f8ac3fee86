"""What a worker does in one repetition of each kind of case; imported by workers only."""

from __future__ import annotations

import copy
import ctypes
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases import Case, Setting
from benchmarks.kept import KeptSubject
from benchmarks.memory import peak_mib, reset_peak
from benchmarks.methods import METHODS, adapted
from benchmarks.models import (
    ATTENTION_OUTPUTS,
    LINEARS,
    OneLayer,
    bare,
    load_encoder,
    load_model,
    twin,
)
from benchmarks.timing import timed_ms
from benchmarks.whole_run import TrainSubject
from benchmarks.wkv import WkvForwardSubject, WkvTrainingSubject

Repetition = Callable[[], dict[str, float]]


def device_name(device: str) -> str:
    """The processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


class LayerSubject:
    """Forward and backward of one linear layer, to the input and to the adapters."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        tokens, in_features, out_features = (case.shape[key] for key in ("tokens", "in", "out"))
        dtype = getattr(torch, case.base_dtype)
        self.case = case
        self.base = OneLayer(in_features, out_features, dtype, case.device)
        self.x = torch.randn(tokens, in_features, dtype=dtype, device=case.device)
        self.gradient = torch.randn(tokens, out_features, dtype=dtype, device=case.device)

    def prepare(self, setting: Setting) -> Repetition:
        """Forward and backward of the layer; the sums of gradients are let go before each."""
        layer = bare(adapted(twin(self.base), setting, ["linear"])).linear
        x = self.x.clone().requires_grad_()
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def forward_backward() -> None:
            for leaf in leaves:
                leaf.grad = None
            layer(x).backward(self.gradient)

        return lambda: {"time_ms": timed_ms(forward_backward, self.case.device, self.case.calls)}


class DecodeSubject(LayerSubject):
    """Forward of one linear layer for one token, as in generation."""

    def prepare(self, setting: Setting) -> Repetition:
        """Forward in inference mode."""
        # Merging changes the weight, which the others share otherwise.
        base = copy.deepcopy(self.base) if METHODS[setting.method].merged else twin(self.base)
        layer = bare(adapted(base, setting, ["linear"])).eval().linear

        def repetition() -> dict[str, float]:
            with torch.inference_mode(), one_generation(layer):
                return {"time_ms": timed_ms(lambda: layer(self.x), self.case.device, self.case.calls)}

        return repetition


def one_generation(layer: torch.nn.Module) -> AbstractContextManager[None]:
    """Makes calls of one of flashbone's layers steps of one generation, between which it keeps what it builds."""
    if not type(layer).__module__.startswith("flashbone."):
        return nullcontext()
    from flashbone.tuner.layers.calls import Gate, one_call

    return one_call(Gate())


class ForwardSubject:
    """Forward of an encoder over a batch, in inference mode."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.base = load_encoder(case.shape["model"], case.base_dtype, case.device)
        size = (case.shape["batch"], case.shape["seq"])
        self.tokens = torch.randint(self.base.config.vocab_size, size, device=case.device)

    def prepare(self, setting: Setting) -> Repetition:
        """Its time."""
        base = copy.deepcopy(self.base) if METHODS[setting.method].merged else twin(self.base)
        model = bare(adapted(base, setting, ATTENTION_OUTPUTS)).eval()

        def repetition() -> dict[str, float]:
            with torch.inference_mode():
                return {"time_ms": timed_ms(lambda: model(input_ids=self.tokens), self.case.device, self.case.calls)}

        return repetition


class LanguageModelSubject:
    """A language model and random tokens for it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.base = load_model(case.shape["model"], case.base_dtype, case.device)
        torch.manual_seed(0)
        size = (case.shape["batch"], case.shape["seq"])
        self.tokens = torch.randint(self.base.config.vocab_size, size, device=case.device)


class MixedSubject(LanguageModelSubject):
    """Forward of a language model over a batch whose rows take turns with the adapters of a setting; inference mode."""

    def prepare(self, setting: Setting) -> Repetition:
        """Its time. With one adapter that is active as usual; several are named row by row."""
        model = adapted(twin(self.base), setting, LINEARS).eval()
        names = {}
        if setting.adapters > 1:
            model.set_adapter("default")
            known = list(model.peft_config)
            names = {"adapter_names": [known[i % len(known)] for i in range(len(self.tokens))]}

        def repetition() -> dict[str, float]:
            with torch.inference_mode():
                call = partial(model, input_ids=self.tokens, **names)
                return {"time_ms": timed_ms(call, self.case.device, self.case.calls)}

        return repetition


class StepSubject(LanguageModelSubject):
    """A training step of a model: forward, backward, AdamW, gradients cleared."""

    def step(self, setting: Setting) -> Callable[[], None]:
        """One step of a setting. The frozen base has nothing to train: there it is forward and backward to the output
        of the embeddings, so that gradients flow through every layer, as they do to adapters in all of them."""
        model = adapted(twin(self.base), setting, LINEARS).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            model.enable_input_require_grads()
        optimiser = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None

        def step() -> None:
            with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.is_autocast):
                loss = model(input_ids=self.tokens, labels=self.tokens).loss
            loss.backward()
            if optimiser is not None:
                optimiser.step()
                optimiser.zero_grad()

        return step

    def prepare(self, setting: Setting) -> Repetition:
        """The time of a step."""
        step = self.step(setting)
        return lambda: {"time_ms": timed_ms(step, self.case.device, self.case.calls)}


class MemorySubject(StepSubject):
    """The peak of memory over a few training steps; one setting a process."""

    def prepare(self, setting: Setting) -> Repetition:
        """The peak of `case.calls` steps: resident memory of the process, or what CUDA allocated."""
        step = self.step(setting)

        def repetition() -> dict[str, float]:
            reset_peak(self.case.device)
            for _ in range(self.case.calls):
                step()
            return {"peak_mib": peak_mib(self.case.device)}

        return repetition


class LiveMemorySubject(MemorySubject):
    """The peak of what is alive: as `MemorySubject`, but with every tensor of 64 KiB or more in pages of its own, which
    go back when it is freed, so that no holes between tensors are counted. glibc only."""

    def __init__(self, case: Case) -> None:
        threshold = -3  # M_MMAP_THRESHOLD; setting it also stops glibc from raising it
        if not ctypes.CDLL(None).mallopt(threshold, 64 * 1024):
            raise RuntimeError("glibc did not take the setting")
        super().__init__(case)


class LoadSubject:
    """Loading an adapter from its folder into a model."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.base = load_model(case.shape["model"], case.base_dtype, case.device)
        self.base.save_pretrained(Path(case.scratch, "model"))

    def prepare(self, setting: Setting) -> Repetition:
        """Save an adapter as `scratch`/METHOD; a repetition loads it into a fresh twin of the model."""
        from peft import PeftModel

        folder = Path(self.case.scratch, setting.method)
        adapted(twin(self.base), setting, LINEARS).save_pretrained(folder)

        def repetition() -> dict[str, float]:
            model = twin(self.base)
            return {"load_ms": timed_ms(lambda: PeftModel.from_pretrained(model, folder), self.case.device)}

        return repetition


class MergeSubject:
    """Merging an adapter into a live model, and taking it out again."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.base = load_model(case.shape["model"], case.base_dtype, case.device)

    def prepare(self, setting: Setting) -> Repetition:
        """Both times. Every model has a base of its own: PEFT's methods merge in place, with rounding."""
        model = adapted(copy.deepcopy(self.base), setting, LINEARS)

        def repetition() -> dict[str, float]:
            merge_ms = timed_ms(model.merge_adapter, self.case.device)
            return {"merge_ms": merge_ms, "unmerge_ms": timed_ms(model.unmerge_adapter, self.case.device)}

        return repetition


SUBJECTS = {
    "layer": LayerSubject,
    "decode": DecodeSubject,
    "forward": ForwardSubject,
    "mixed": MixedSubject,
    "step": StepSubject,
    "memory": MemorySubject,
    "live_memory": LiveMemorySubject,
    "alive": KeptSubject,
    "load": LoadSubject,
    "merge": MergeSubject,
    "train": TrainSubject,
    "wkv_forward": WkvForwardSubject,
    "wkv_training": WkvTrainingSubject,
}
