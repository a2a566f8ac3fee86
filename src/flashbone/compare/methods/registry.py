"""The registry of methods: the Bone family, PEFT's peers, and the two bounds that every adapter lies between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

Size = int | Mapping[str, Any] | None


@dataclass(frozen=True)
class Method:
    """One way to fine-tune a model.

    Attributes:
        name: in configurations and results.
        title: for people.
        config_class: class of its configuration, BoneConfig or one of PEFT's; None: it is a bound, not an adapter.
        identity: fields that make the method what it is; settings cannot change them.
        defaults: other fields that differ from the class's own defaults; settings win over them.
        size_fields: fields that decide how many parameters it has, the first being the one that is matched to a budget.
        alpha: lora_alpha as a multiple of the rank, in every layer; None: `defaults` has it, or there is none.
        rate_factor: what the common grid of learning rates is multiplied by.
        source: where the defaults and the factor come from.
    """

    name: str
    title: str
    config_class: str | None = None
    identity: Mapping[str, Any] = field(default_factory=dict, hash=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    size_fields: tuple[str, ...] = ()
    alpha: int | None = None
    rate_factor: float = 1.0
    source: str = ""

    @property
    def is_bound(self) -> bool:
        """Whether it trains the model's own parameters, and has no adapter."""
        return self.config_class is None

    @property
    def has_size(self) -> bool:
        """Whether the number of its parameters can be chosen."""
        return bool(self.size_fields)

    @property
    def has_patterns(self) -> bool:
        """Whether single modules can have sizes of their own (`rank_pattern`)."""
        return self.config_class in ("BoneConfig", "LoraConfig")

    @property
    def peft_type(self) -> str | None:
        """As PEFT calls it, such as "LORA"; None of a bound."""
        return None if self.config_class is None else self.config_class.removesuffix("Config").upper()

    def config(
        self,
        size: Size,
        target_modules: list[str] | str | None,
        task_type: str | None,
        settings: Mapping[str, Any] | None = None,
    ) -> PeftConfig | None:
        """A new configuration; PEFT writes into the one that it attaches, so make one for each model.

        Args:
            size: The first of `size_fields`, or several fields (`Sized.settings`); None: what the settings or the class
                say.
            target_modules: Names, a regular expression or "all-linear", as PEFT takes them; settings may have others.
            task_type: "CAUSAL_LM" or "SEQ_CLS", as PEFT calls them.
            settings: The user's own fields of the configuration's class.

        Returns:
            The configuration; None of a bound.

        Raises:
            ConfigError: a setting is unknown (all of them are named), or has a value that the method cannot take.
        """
        from flashbone.compare.methods.configs import build

        return build(self, size, target_modules, task_type, settings or {})


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    raise ConfigError(f"method: got {name!r}, wanted one of {', '.join(METHODS)}")


_BONE = {"config_class": "BoneConfig", "size_fields": ("r", "rank_pattern"), "source": "arXiv 2409.15371"}
_LORA = {"config_class": "LoraConfig", "size_fields": ("r", "rank_pattern")}
# PEFT's comparison of methods: one rate of 1e-4 for all but those that say otherwise; LoRA and DoRA with alpha = 2 r.
_PEFT_COMPARISON = "huggingface/peft, method_comparison/MetaMathQA/experiments"

# Where a factor is not 1, the rate with the lowest held-out loss was measured on MiniLM, query and value, 147,456
# parameters, BBC news, 30 steps of 8 texts of 32 tokens, AdamW, no decay or dropout, one seed, rates a factor 3 apart.
# That of LoRA, bone, bat-row, orthogonal and OFT was 0.003, HRA's 0.01, little ahead of 0.003.
_ALL = (
    Method("bone", "Bone", identity={"variant": "bone"}, **_BONE),
    Method("bat-row", "Bone (bat-row)", identity={"variant": "bat-row"}, **_BONE),
    Method("bat-col", "Bone (bat-col)", identity={"variant": "bat-col"}, **_BONE),
    Method(
        "mini", "Bone (mini)", identity={"variant": "mini"}, **{**_BONE, "size_fields": ("r", "mini_r", "rank_pattern")}
    ),
    Method(
        "orthogonal",
        "Bone (orthogonal)",
        identity={"variant": "orthogonal"},
        **{**_BONE, "size_fields": ("r", "bottleneck_size", "rank_pattern")},
    ),
    Method(
        "lora", "LoRA", identity={"use_dora": False, "use_rslora": False}, alpha=2, source=_PEFT_COMPARISON, **_LORA
    ),
    # One alpha for all ranks, divided by the root of the rank, is what the method is; 16 is the paper's.
    Method(
        "rslora",
        "rsLoRA",
        identity={"use_rslora": True},
        defaults={"lora_alpha": 16},
        source="arXiv 2312.03732",
        **_LORA,
    ),
    Method("dora", "DoRA", identity={"use_dora": True}, alpha=2, source=_PEFT_COMPARISON, **_LORA),
    # The paper's alpha = r, so that B A is the part of W that was taken out. 16 iterations of the fast SVD are what its
    # authors and PEFT's documentation advise; the full one takes minutes for a large model.
    Method(
        "pissa",
        "PiSSA",
        defaults={"init_lora_weights": "pissa_niter_16"},
        alpha=1,
        source="arXiv 2404.02948",
        **_LORA,
    ),
    # PEFT's example has alpha = r, too; the paper's code has no scale.
    Method("olora", "OLoRA", identity={"init_lora_weights": "olora"}, alpha=1, source="arXiv 2406.01775", **_LORA),
    # PEFT's own defaults otherwise: the Neumann series of five terms, which is what runs when nothing is said.
    Method("oft", "OFT", "OFTConfig", size_fields=("oft_block_size", "r"), source="arXiv 2306.07280"),
    # Measured best: 0.01, by far.
    Method(
        "boft",
        "BOFT",
        "BOFTConfig",
        size_fields=("boft_block_size", "boft_block_num"),
        rate_factor=3.0,
        source="arXiv 2311.06243",
    ),
    Method("hra", "HRA", "HRAConfig", size_fields=("r",), source="arXiv 2405.17484"),
    # Measured best: 0.03. PEFT's default of d_initial, 0.1, is the paper's.
    Method("vera", "VeRA", "VeraConfig", size_fields=("r",), rate_factor=10.0, source="arXiv 2310.11454"),
    Method("miss", "MiSS", "MissConfig", size_fields=("r",), source="arXiv 2409.15371"),
    # Measured best: 0.03. PEFT's comparison has 50 times the others' rate, but 1e-4 is low for them.
    Method("ia3", "(IA)3", "IA3Config", rate_factor=10.0, source=f"arXiv 2205.05638; {_PEFT_COMPARISON}"),
    # Measured best: 0.0003; 1e-5 in PEFT's comparison, where the others have 1e-4.
    Method("full", "Full fine-tuning", rate_factor=0.1, source=_PEFT_COMPARISON),
    # Measured best: 0.1, nearly as good: 0.03.
    Method("linear", "Linear probing", rate_factor=30.0),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
