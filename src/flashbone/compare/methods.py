"""The methods that `flashbone compare` knows: the Bone family, PEFT's others, and two bounds.

To add a method, add an entry to `METHODS`; nothing else asks for a method's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flashbone.compare.bounds import train_all, train_head
from flashbone.compare.training_method import Settings, TrainingMethod
from flashbone.errors import ConfigError
from flashbone.variants import VARIANTS, Variant, dimensions


def ranks(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Every r up to the smallest input; more rows would have nothing to do."""
    return [[{"r": r} for r in range(1, min(layer.in_features for layer in layers) + 1)]]


def directions(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Every r up to the shortest side of a layer; W has no more directions."""
    return [[{"r": r} for r in range(1, min(map(_shorter_side, layers)) + 1)]]


def squares(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Edges of blocks that divide every layer; then others, of whose last block a part trains for nothing."""
    whole = _divisors([side for layer in layers for side in (layer.in_features, layer.out_features)])
    return [[{"r": r} for r in whole], *directions(layers, settings)]


def tiles(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Tiles used at least twice in each layer, and equally often everywhere where a divisor allows that; then tiles as
    wide as the narrowest layer. A size that the user sets is kept, and the other varied."""
    outputs = [layer.out_features for layer in layers]
    if "r" in settings:
        return [[{"mini_r": width} for width in range(1, min(outputs) + 1)]]
    half = max((d for d in _divisors(outputs) if 2 * d <= min(outputs)), default=1)
    widths = [settings["mini_r"]] if "mini_r" in settings else [half, min(outputs)]
    return [[{**size, "mini_r": width} for size in ranks(layers, settings)[0]] for width in widths]


def blocks(layers: Sequence[Any], settings: Settings) -> list[list[dict[str, Any]]]:
    """Blocks that divide the inputs of all layers; one of 1 would rotate nothing."""
    return [[{"oft_block_size": d} for d in _divisors([layer.in_features for layer in layers]) if d > 1]]


def _divisors(numbers: Sequence[int]) -> list[int]:
    """Common divisors, rising."""
    common = math.gcd(*numbers)
    return [d for d in range(1, common + 1) if common % d == 0]


def _shorter_side(layer: Any) -> int:
    return min(layer.in_features, layer.out_features)


def _check_directions(name: str, layer: Any, r: int) -> None:
    """A start that takes W apart finds as many directions as its shorter side has entries."""
    if r > _shorter_side(layer):
        raise ConfigError(f"r={r}, but {name} has only {_shorter_side(layer)} directions; choose a smaller r")


def _check_olora(name: str, layer: Any, r: int) -> None:
    if layer.fan_in_fan_out:
        raise ConfigError(f"{name} is a Conv1D, which PEFT's OLoRA takes for its transpose; leave the method out")
    _check_directions(name, layer, r)


def _bone(variant: Variant) -> TrainingMethod:
    """The entry of a variant: how its sizes are searched follows from the shape of its block."""
    has_tiles = variant.block_shape(4, 4, 2, 1) != variant.block_shape(4, 4, 2, 2)
    return TrainingMethod(
        variant.name,
        "Bone" if type(variant) is next(iter(VARIANTS.values())) else f"Bone ({variant.name})",
        "BoneConfig",
        identity={"variant": variant.name},
        size_fields=("r", "mini_r") if has_tiles else ("r",),
        sizes=tiles if has_tiles else squares if dimensions(variant) == 3 else ranks,
        source="arXiv 2409.15371",
    )


# PEFT's comparison of methods: one rate of 1e-4 for all but those that set another; LoRA and DoRA with alpha = 2 r.
_PEFT_COMPARISON = "huggingface/peft, method_comparison/MetaMathQA/experiments"
_LORA: dict[str, Any] = {"config_class": "LoraConfig", "size_fields": ("r",), "sizes": ranks}

# Where a factor is not 1, the rate with the lowest held-out loss was measured on MiniLM, query and value, 147,456
# parameters, BBC news, 30 steps of 8 texts of 32 tokens, AdamW, no decay or dropout, one seed, rates a factor 3 apart.
# That of LoRA, bone, bat-row, orthogonal and OFT was 0.003, HRA's 0.01, little ahead of 0.003.
_ALL = (
    *(_bone(kind()) for kind in VARIANTS.values()),
    TrainingMethod(
        "lora", "LoRA", identity={"use_dora": False, "use_rslora": False}, alpha=2, source=_PEFT_COMPARISON, **_LORA
    ),
    # One alpha for all ranks, divided by the root of the rank, is what the method is; 16 is the paper's.
    TrainingMethod(
        "rslora",
        "rsLoRA",
        identity={"use_rslora": True},
        defaults={"lora_alpha": 16},
        source="arXiv 2312.03732",
        **_LORA,
    ),
    TrainingMethod("dora", "DoRA", identity={"use_dora": True}, alpha=2, source=_PEFT_COMPARISON, **_LORA),
    # The paper's alpha = r, so that B A is the part of W that was taken out. 16 iterations of the fast SVD are what its
    # authors and PEFT's documentation advise; the full one takes minutes for a large model.
    TrainingMethod(
        "pissa",
        "PiSSA",
        identity={"init_lora_weights": "pissa_niter_16"},
        alpha=1,
        check_layer=_check_directions,
        not_quantised="it takes the base's weights apart, which a quantised base does not have",
        source="arXiv 2404.02948",
        **{**_LORA, "sizes": directions},
    ),
    # PEFT's example has alpha = r, too; the paper's code has no scale.
    TrainingMethod(
        "olora",
        "OLoRA",
        identity={"init_lora_weights": "olora"},
        alpha=1,
        check_layer=_check_olora,
        not_quantised="it changes the base's weights, which would be quantised a second time",
        source="arXiv 2406.01775",
        **{**_LORA, "sizes": directions},
    ),
    # PEFT's own defaults otherwise: the Neumann series of five terms, which is what runs when nothing is set.
    TrainingMethod("oft", "OFT", "OFTConfig", size_fields=("oft_block_size",), sizes=blocks, source="arXiv 2306.07280"),
    # Measured best: 0.01, by far. Without its CUDA extension PEFT would train one factor whatever the settings are.
    TrainingMethod(
        "boft",
        "BOFT",
        "BOFTConfig",
        identity={"boft_n_butterfly_factor": 1},
        size_fields=("boft_block_size", "boft_block_num"),
        rate_factor=3.0,
        source="arXiv 2311.06243",
    ),
    TrainingMethod(
        "hra",
        "HRA",
        "HRAConfig",
        size_fields=("r",),
        not_quantised="PEFT's HRA reads the base's weights, which a quantised base does not have",
        source="arXiv 2405.17484",
    ),
    # Measured best: 0.03. PEFT's default of d_initial, 0.1, is the paper's.
    TrainingMethod(
        "vera",
        "VeRA",
        "VeraConfig",
        size_fields=("r",),
        seed_field="projection_prng_key",
        rate_factor=10.0,
        source="arXiv 2310.11454",
    ),
    TrainingMethod("miss", "MiSS", "MissConfig", size_fields=("r",), sizes=ranks, source="arXiv 2409.15371"),
    # Measured best: 0.03. PEFT's comparison has 50 times the others' rate, but 1e-4 is low for them.
    TrainingMethod("ia3", "(IA)3", "IA3Config", rate_factor=10.0, source=f"arXiv 2205.05638; {_PEFT_COMPARISON}"),
    # Measured best: 0.0003; 1e-5 in PEFT's comparison, where the others have 1e-4.
    TrainingMethod(
        "full",
        "Full fine-tuning",
        train=train_all,
        size_words="all parameters",
        not_quantised="the weights of a quantised base cannot be trained",
        rate_factor=0.1,
        source=_PEFT_COMPARISON,
    ),
    # Measured best: 0.1, nearly as good: 0.03.
    TrainingMethod(
        "linear",
        "Linear probing",
        train=train_head,
        size_words="the head",
        not_quantised="Trainer takes no quantised model without an adapter",
        rate_factor=30.0,
    ),
)
METHODS: dict[str, TrainingMethod] = {method.name: method for method in _ALL}


def get_method(name: str) -> TrainingMethod:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    raise ConfigError(f"method: got {name!r}, wanted one of {', '.join(METHODS)}")
