"""What is measured: a case (the work and its size) and the settings of methods that are compared on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
AUTOCAST = "-autocast"
DTYPES = {"bf16-autocast": f"bfloat16{AUTOCAST}", "bf16": "bfloat16", "fp32": "float32"}


def _llama(vocab: int, hidden: int, intermediate: int, heads: int, key_value_heads: int, layers: int) -> dict[str, Any]:
    names = "vocab_size", "hidden_size", "intermediate_size"
    sizes = dict(zip(names, (vocab, hidden, intermediate), strict=True))
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "num_hidden_layers": layers}
    return {**sizes, "tie_word_embeddings": hidden < 4096}


# Llamas in these shapes, with random weights: sizes of their configurations.
MODELS = {
    "tiny": _llama(128, 64, 128, 4, 2, 2),
    "smollm2": _llama(49152, 576, 1536, 9, 3, 30),  # SmolLM2-135M
    "smollm2-12": _llama(49152, 576, 1536, 9, 3, 12),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 32, 8, 16),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 24, 8, 28),
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 8, 32),
}
# What a benchmark runs on, unless asked otherwise.
MODEL, MODEL_OF_FP32 = "smollm2-12", "smollm2"


@dataclass(frozen=True)
class Setting:
    """One method with its sizes.

    Attributes:
        method: A name of `benchmarks.methods.METHODS`.
        r: Block size. LoRA and DoRA run with rank r/2: on square layers that is as many parameters.
        adapters: How many adapters are active at once.
    """

    method: str
    r: int = 64
    adapters: int = 1

    @property
    def label(self) -> str:
        """Its name in requests, progress lines and errors."""
        return f"{self.method} r={self.r} x{self.adapters}"


FROZEN = Setting("frozen", r=0, adapters=0)


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        kind: A name of `benchmarks.subjects.SUBJECTS`.
        shape: Its size: tokens, in and out of a layer; or model, batch and seq (tokens a row) of a model.
        dtype: Of the base and the input, one of `DTYPES`; adapters are in fp32. "-autocast": under bf16 autocast, as
            the Trainer runs with `bf16: true`.
        device: "cpu" or "cuda".
        calls: Calls in one timed repetition; times are per call.
        scratch: A folder for files of the case, such as saved adapters.
    """

    kind: str
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"
    calls: int = 1
    scratch: str = ""

    @property
    def base_dtype(self) -> str:
        """torch's name of the base's dtype."""
        return self.dtype.removesuffix(AUTOCAST)

    @property
    def is_autocast(self) -> bool:
        """Whether it runs under autocast."""
        return self.dtype.endswith(AUTOCAST)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a request to a worker."""
        return asdict(self)
