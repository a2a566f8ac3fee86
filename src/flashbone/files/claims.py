"""What a model's config.json claims, bounded before anything is built by it: a kilobyte can ask for a terabyte."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from flashbone.errors import FormatError, visible

DEEPEST = 8
LARGEST = 2**63  # of any number; what is looked at below is bounded further
# The first pattern that fits the name of a field. Each layer, block and expert may be a module of its own, each label
# an entry of a table, and an image has as many positions as patches.
_LIMITS = {
    r"\w*(layers?|blocks?|depths?)": 1024,
    r"\w*experts": 4096,
    r"\w*heads?(_dim)?": 1 << 16,
    r"num_labels": 100_000,
    r"\w*image_size": 1 << 14,
    r"\w*(_sizes?|_dims?|_widths?|_channels|_lengths?|positions?|embeddings|n_embd|d_model|d_ff|d_inner|n_ctx)": 1
    << 24,
}
_HIDDEN = ("hidden_size", "d_model", "n_embd")
# What a model has a matrix of by its hidden size.
_BESIDE = (*_HIDDEN, "vocab_size", "intermediate_size", "n_inner", "max_position_embeddings", "n_positions")
_BESIDE += ("max_source_positions", "max_target_positions")
# These keep a mask of all positions by all.
_SQUARE, _MOST_OF_SQUARE = ("clvp", "gpt_bigcode", "gpt_neo", "imagegpt"), 1 << 14
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_ALWAYS, _MOST_PATCHES = 1 << 24, 1 << 20  # numbers of a matrix that any model may have; patches of an image


def check(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config that no model could have, or that claims far more than the weights beside it hold.

    Raises:
        FormatError: it does; all such fields are named.
    """
    held = sum(f.stat().st_size for f in file.parent.iterdir() if f.suffix in _WEIGHTS and f.is_file())
    problems = list(_problems(config, "", 0))
    if held and not problems:
        problems = list(_beyond(config, held, ""))
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}; is it damaged?")


def _problems(config: Mapping[str, Any], path: str, depth: int) -> Iterator[str]:
    """Fields that are larger than those of any model."""
    if depth > DEEPEST:
        yield f"{visible(path)} is nested more than {DEEPEST} deep"
        return
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _problems(value, f"{path}{name}.", depth + 1)
        largest = max((n for n in (value if isinstance(value, list) else [value]) if _is_number(n)), default=0)
        limit = _limit(name)
        if largest > limit or -largest > LARGEST:
            yield f"{visible(path + name)}: got {_shown(largest)}, wanted at most {limit:,}"
    size, patch = config.get("image_size"), config.get("patch_size") or 1
    if _is_number(size) and _is_number(patch) and patch > 0 and (size / patch) ** 2 > _MOST_PATCHES:
        yield f"{path}image_size: got {size:,} in patches of {patch:,}, wanted at most {_MOST_PATCHES:,} patches"
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if config.get("model_type") in _SQUARE and _is_number(positions) and positions > _MOST_OF_SQUARE:
        yield f"{path}max_position_embeddings: got {positions:,}, wanted at most {_MOST_OF_SQUARE:,}"


def _beyond(config: Mapping[str, Any], held: int, path: str) -> Iterator[str]:
    """Matrices that the weights could not hold, since a number of them has one bit at least."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _beyond(value, held, f"{path}{name}.")
    hidden = next((config[name] for name in _HIDDEN if _is_number(config.get(name))), 0)
    for name in _BESIDE:
        value = config.get(name)
        if _is_number(value) and hidden * value > max(_ALWAYS, 8 * held):
            beside = "" if name in _HIDDEN else f" with a hidden size of {hidden:,}"
            yield f"{path}{name}: got {value:,}{beside}, but the weights beside it have only {held:,} bytes"


def _limit(name: str) -> int:
    return next((limit for pattern, limit in _LIMITS.items() if re.fullmatch(pattern, name)), LARGEST)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: float) -> str:
    return f"{value:,}" if abs(value) < LARGEST else "a number beyond 2^63"
