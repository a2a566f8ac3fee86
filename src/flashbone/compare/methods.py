"""The methods that `flashbone compare` knows: the Bone family, PEFT's others, and two bounds.

To add a method, add an entry to `METHODS`; nothing else asks for a method's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flashbone.compare.bounds import train_all, train_head
from flashbone.compare.size_lists import (
    Settings,
    SizeLists,
    blocks,
    circles,
    directions,
    halves,
    ranks,
    shorter_side,
    squares,
    tiles,
)
from flashbone.errors import ConfigError
from flashbone.train.fields import check_names, field_names
from flashbone.variants import VARIANTS, Variant, dimensions

# Fields that configurations have and settings cannot change.
_DECIDED = {
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), "the comparison decides it"),
    **dict.fromkeys(("peft_type", "auto_mapping", "peft_version"), "PEFT writes it"),
    **dict.fromkeys(("inference_mode", "runtime_config"), "leave it out: a comparison always trains"),
}


@dataclass(frozen=True)
class TrainingMethod:
    """One way to fine-tune a model: everything that a comparison knows about it.

    Attributes:
        name: in configurations and results.
        title: for people.
        config_class: class of its configuration, BoneConfig or one of PEFT's; None: it is a bound, not an adapter.
        train: of a bound: makes the model's own parameters train.
        identity: fields that make the method what it is; settings cannot change them.
        defaults: other fields that differ from the class's own defaults; settings win over them.
        size_fields: fields that decide how many parameters it has.
        sizes: what it can be matched to a budget with; None: it keeps the user's size, or PEFT's default.
        smallest: the least value of the first of `size_fields`.
        size_words: its size in words, where no field decides it.
        alpha: lora_alpha as a multiple of the rank, in every layer; None: `defaults` has it, or there is none.
        seed_field: the field that seeds random matrices which do not follow torch's seed.
        check_layer: raises ConfigError where it cannot be what it is: (name of a layer, the layer, its r).
        needs_weights: whether it reads or changes the base's weights, which a quantised base does not have.
        rate_factor: what the common grid of learning rates is multiplied by.
    """

    name: str
    title: str
    config_class: str | None = None
    train: Callable[[Any], Any] | None = None
    identity: Settings = field(default_factory=dict, hash=False)
    defaults: Settings = field(default_factory=dict, hash=False)
    size_fields: tuple[str, ...] = ()
    sizes: SizeLists | None = None
    smallest: int = 1
    size_words: str = "no size"
    alpha: int | None = None
    seed_field: str | None = None
    check_layer: Callable[[str, Any, int], None] | None = None
    needs_weights: bool = False
    rate_factor: float = 1.0

    @property
    def is_bound(self) -> bool:
        """Whether it trains the model's own parameters, and has no adapter."""
        return self.train is not None

    @property
    def has_patterns(self) -> bool:
        """Whether single modules can have sizes of their own (`rank_pattern`)."""
        return self.config_class in ("BoneConfig", "LoraConfig", "HiraConfig")

    @property
    def peft_type(self) -> str | None:
        """As PEFT calls it, such as "LORA"; None of a bound."""
        return None if self.config_class is None else self.config_class.removesuffix("Config").upper()

    def config(
        self, size: Settings, target_modules: list[str] | str | None, task_type: str | None, settings: Settings
    ) -> Any:
        """A new configuration; PEFT writes into the one that it attaches, so make one for each model.

        Args:
            size: Fields of the size, see `MethodSize.settings`.
            target_modules: Names, a regular expression or "all-linear", as PEFT takes them; settings may have others.
            task_type: "CAUSAL_LM" or "SEQ_CLS", as PEFT calls them.
            settings: The user's own fields of the configuration's class.

        Returns:
            The configuration; None of a bound.

        Raises:
            ConfigError: a setting is unknown (all of them are named), or has a value that the method cannot take.
        """
        if self.config_class is None:
            if settings:
                raise ConfigError(f"{self.name}: it has no settings, but got {', '.join(settings)}; leave them out")
            return None
        kind = _config_class(self.config_class)
        check_names(list(settings), field_names(kind), self.name, _DECIDED)
        fields = {**self.identity, **self.defaults, "target_modules": target_modules, "task_type": task_type}
        fields |= {**size, **settings}
        try:
            if self.alpha is not None and "lora_alpha" not in settings:
                fields |= self._alphas(fields, settings)
            config = kind(**fields)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(f"{self.name}: {' '.join(str(error).split())}") from error
        for name, value in self.identity.items():  # settings may also change one through another
            if not _means(other := getattr(config, name), value):
                raise ConfigError(f"{self.name}: {name}={other!r} makes it another method, wanted {value!r}")
        for method in METHODS.values() if self.config_class == "LoraConfig" else ():
            start = method.identity.get("init_lora_weights")
            if start and "init_lora_weights" not in self.identity and _means(config.init_lora_weights, start):
                raise ConfigError(f"{self.name}: init_lora_weights={start!r} is the method {method.name}; list that")
        return config

    def describe(self, config: Any) -> str:
        """The size that a configuration has: "r = 18", "r = 17 or 18", "oft_block_size = 64"."""
        fields = {name: getattr(config, name, None) for name in (*self.size_fields, "r")}
        values = {name: value for name, value in fields.items() if value}
        ranks = sorted({values.get("r", 0), *(getattr(config, "rank_pattern", None) or {}).values()})
        if len(ranks) > 1:
            values["r"] = f"{ranks[0]} or {ranks[1]}" if len(ranks) == 2 else f"{ranks[0]} to {ranks[-1]}"
        return ", ".join(f"{name} = {value}" for name, value in values.items()) or self.size_words

    def has_fixed_size(self, settings: Settings) -> bool:
        """Whether the user's settings decide the size, or nothing does."""
        others = settings.keys() & {"rank_pattern", "bottleneck_size"}
        return self.sizes is None or bool(others) or set(self.size_fields) <= set(settings)

    def _alphas(self, fields: Settings, settings: Settings) -> dict[str, Any]:
        """The same scale in all layers, also where their ranks differ."""
        assert self.alpha is not None
        alphas: dict[str, Any] = {"lora_alpha": self.alpha * fields.get("r", 8)}  # LoraConfig's default
        if fields.get("rank_pattern") and "alpha_pattern" not in settings:
            alphas["alpha_pattern"] = {name: self.alpha * r for name, r in fields["rank_pattern"].items()}
        return alphas


def _means(value: Any, wanted: Any) -> bool:
    """Whether a field has the value that makes a method what it is; PiSSA's may name a number of iterations."""
    return value == wanted or (isinstance(wanted, str) and str(value).startswith(f"{wanted}_niter_"))


def _config_class(name: str) -> Any:
    import peft  # first: BONE is registered when peft has been imported

    from flashbone import BoneConfig

    return BoneConfig if name == "BoneConfig" else getattr(peft, name)


def _check_directions(name: str, layer: Any, r: int) -> None:
    """A start that takes W apart finds as many directions as its shorter side has entries."""
    if r > shorter_side(layer):
        raise ConfigError(f"r={r}, but {name} has only {shorter_side(layer)} directions; choose a smaller r")


def _check_olora(name: str, layer: Any, r: int) -> None:
    if layer.fan_in_fan_out:
        raise ConfigError(f"{name} is a Conv1D, which PEFT's OLoRA takes for its transpose; leave the method out")
    _check_directions(name, layer, r)


def bone_method(variant: Variant) -> TrainingMethod:
    """The entry of a variant: how its sizes are searched follows from the shape of its block."""
    has_tiles = variant.block_shape(4, 4, 2, 1) != variant.block_shape(4, 4, 2, 2)
    return TrainingMethod(
        variant.name,
        "Bone" if type(variant) is next(iter(VARIANTS.values())) else f"Bone ({variant.name})",
        "BoneConfig",
        identity={"variant": variant.name},
        size_fields=("r", "mini_r") if has_tiles else ("r",),
        sizes=tiles if has_tiles else squares if dimensions(variant) == 3 else ranks,
    )


_LORA: dict[str, Any] = {"config_class": "LoraConfig", "size_fields": ("r",), "sizes": ranks}
# A start from parts of W: alpha = r, so that B A is the part that was taken out.
_PART: dict[str, Any] = {**_LORA, "sizes": directions, "alpha": 1, "needs_weights": True}

# "PEFT's comparison" is huggingface/peft, method_comparison/MetaMathQA/experiments: one rate of 1e-4 for all but those
# that set another. Where a factor is not 1, the rate with the lowest held-out loss was measured on MiniLM, query and
# value, 147,456 parameters, BBC news, 30 steps of 8 texts of 32 tokens, AdamW, no decay or dropout, one seed, rates a
# factor 3 apart. That of LoRA, bone, bat-row, orthogonal and OFT was 0.003, HRA's 0.01, little ahead of 0.003.
_ALL = (
    *(bone_method(kind()) for kind in VARIANTS.values()),  # arXiv 2409.15371
    # alpha = 2 r in PEFT's comparison, for DoRA, too.
    TrainingMethod("lora", "LoRA", identity={"use_dora": False, "use_rslora": False}, alpha=2, **_LORA),
    TrainingMethod("dora", "DoRA", identity={"use_dora": True}, alpha=2, **_LORA),
    # arXiv 2312.03732: one alpha for all ranks, divided by the root of the rank, is what the method is; 16 is theirs.
    TrainingMethod("rslora", "rsLoRA", identity={"use_rslora": True}, defaults={"lora_alpha": 16}, **_LORA),
    # arXiv 2404.02948. 16 iterations of the fast SVD are what its authors and PEFT's documentation advise; the full one
    # takes minutes for a large model.
    TrainingMethod(
        "pissa",
        "PiSSA",
        identity={"init_lora_weights": "pissa"},
        defaults={"init_lora_weights": "pissa_niter_16"},
        check_layer=_check_directions,
        **_PART,
    ),
    # arXiv 2406.01775. PEFT's example has alpha = r, too; the paper's code has no scale.
    TrainingMethod("olora", "OLoRA", identity={"init_lora_weights": "olora"}, check_layer=_check_olora, **_PART),
    # arXiv 2306.07280. PEFT's defaults otherwise: the Neumann series of five terms.
    TrainingMethod("oft", "OFT", "OFTConfig", size_fields=("oft_block_size",), sizes=blocks),
    TrainingMethod("miss", "MiSS", "MissConfig", size_fields=("r",), sizes=ranks),  # arXiv 2409.15371
    # PEFT's defaults otherwise: every two layers share A, all layers two B.
    TrainingMethod("lily", "Lily", "LilyConfig", defaults={"stride_A": 2}, size_fields=("r",), sizes=ranks),
    # The update is multiplied by W, entry by entry; PEFT's comparison has 45 times the others' rate.
    TrainingMethod("hira", "HiRA", "HiraConfig", size_fields=("r",), sizes=ranks, needs_weights=True, rate_factor=10.0),
    TrainingMethod(
        "shira",
        "SHiRA",
        "ShiraConfig",
        size_fields=("r",),
        sizes=ranks,
        seed_field="random_seed",
        needs_weights=True,
    ),
    # alpha = 2 r and two sub-blocks in PEFT's comparison.
    TrainingMethod("gralora", "GraLoRA", "GraloraConfig", size_fields=("r",), sizes=halves, smallest=2),
    # A start of zeros changes no output; its kernel is divided by the layer's inputs: 0.3 in PEFT's comparison.
    TrainingMethod(
        "c3a",
        "C3A",
        "C3AConfig",
        defaults={"init_weights": True},
        size_fields=("block_size",),
        sizes=circles,
        rate_factor=100.0,
    ),
    # arXiv 2311.06243. Measured best: 0.01, by far. Without a CUDA extension PEFT trains one factor, whatever is set.
    TrainingMethod(
        "boft",
        "BOFT",
        "BOFTConfig",
        identity={"boft_n_butterfly_factor": 1},
        size_fields=("boft_block_size", "boft_block_num"),
        rate_factor=3.0,
    ),
    TrainingMethod("hra", "HRA", "HRAConfig", size_fields=("r",), needs_weights=True),  # arXiv 2405.17484
    # arXiv 2310.11454, as PEFT's default of d_initial, 0.1. Measured best: 0.03.
    TrainingMethod(
        "vera", "VeRA", "VeraConfig", size_fields=("r",), seed_field="projection_prng_key", rate_factor=10.0
    ),
    # arXiv 2205.05638. Measured best: 0.03. PEFT's comparison has 50 times the others' rate, but 1e-4 is low for them.
    TrainingMethod("ia3", "(IA)3", "IA3Config", rate_factor=10.0),
    # Measured best: 0.0003; 1e-5 in PEFT's comparison.
    TrainingMethod(
        "full",
        "Full fine-tuning",
        train=train_all,
        size_words="all parameters",
        needs_weights=True,
        rate_factor=0.1,
    ),
    # Measured best: 0.1, nearly as good: 0.03. Trainer takes no quantised model without an adapter.
    TrainingMethod(
        "linear", "Linear probing", train=train_head, size_words="the head", needs_weights=True, rate_factor=30.0
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
