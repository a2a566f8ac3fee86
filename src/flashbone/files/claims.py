"""What a model's config.json claims, bounded before anything is built by it: a kilobyte can ask for a terabyte."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashbone.errors import FormatError, visible

MOST_LAYERS, LARGEST_SIZE, DEEPEST = 1024, 1 << 24, 8
_COUNTS = re.compile(r"\w*(layers?|blocks?|depth)")
_SIZES = re.compile(r"\w*(_size|_dim|_width|_channels|_heads|_experts|n_embd|d_model|d_ff|d_inner)")
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def check(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config that no model could have, or that claims far more than the weights beside it hold.

    Raises:
        FormatError: it does; all such fields are named.
    """
    fields = list(_numbers(config, "", 0))
    problems = [
        f"{name}: got {value:,}, wanted at most {limit:,}"
        for name, value in fields
        if value > (limit := _limit(name.rpartition(".")[2]))
    ]
    held = sum(f.stat().st_size for f in file.parent.iterdir() if f.suffix in _WEIGHTS and f.is_file())
    for name, value in fields:
        # A model has a square matrix of its hidden size, and a number of it at least one bit.
        if held and not problems and name.rpartition(".")[2] in _HIDDEN and value * value > 8 * held:
            problems.append(f"{name}: got {value:,}, but the weights beside it have only {held:,} bytes")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}; is it damaged?")


def _numbers(config: Mapping[str, Any], path: str, depth: int) -> Iterator[tuple[str, int]]:
    if depth > DEEPEST:
        raise FormatError(f"{visible(path)}: a config is nested at most {DEEPEST} deep; is it damaged?")
    for name, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield f"{path}{name}", value
        elif isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}.", depth + 1)


def _limit(name: str) -> float:
    if _COUNTS.fullmatch(name):
        return MOST_LAYERS
    return LARGEST_SIZE if _SIZES.fullmatch(name) else float("inf")
