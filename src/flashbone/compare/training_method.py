"""What a comparison knows about a method of fine-tuning, and how that becomes a configuration of PEFT's."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashbone.errors import ConfigError

Settings = Mapping[str, Any]
# (the adapted layers, the user's settings) -> lists of sizes, each list by rising size. The second list is tried where
# the first does not come near the budget.
SizeLists = Callable[[Sequence[Any], Settings], list[list[dict[str, Any]]]]

# Fields that configurations have and a comparison decides itself.
DECIDED = {
    "task_type": "the comparison's task decides it",
    "peft_type": "the method decides it",
    "auto_mapping": "PEFT writes it",
    "peft_version": "PEFT writes it",
    "base_model_name_or_path": "the comparison's model decides it",
    "revision": "the comparison's model decides it",
    "inference_mode": "a comparison always trains",
    "runtime_config": "it is not part of the method",
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
        size_words: its size in words, where no field decides it.
        alpha: lora_alpha as a multiple of the rank, in every layer; None: `defaults` has it, or there is none.
        seed_field: the field that seeds random matrices which do not follow torch's seed.
        check_layer: raises ConfigError where it cannot be what it is: (name of a layer, the layer, its r).
        not_quantised: why it cannot train on a quantised base; empty: it can.
        rate_factor: what the common grid of learning rates is multiplied by.
        source: where the defaults and the factor come from.
    """

    name: str
    title: str
    config_class: str | None = None
    train: Callable[[Any], Any] | None = None
    identity: Settings = field(default_factory=dict, hash=False)
    defaults: Settings = field(default_factory=dict, hash=False)
    size_fields: tuple[str, ...] = ()
    sizes: SizeLists | None = None
    size_words: str = "no size"
    alpha: int | None = None
    seed_field: str | None = None
    check_layer: Callable[[str, Any, int], None] | None = None
    not_quantised: str = ""
    rate_factor: float = 1.0
    source: str = ""

    @property
    def is_bound(self) -> bool:
        """Whether it trains the model's own parameters, and has no adapter."""
        return self.train is not None

    @property
    def has_patterns(self) -> bool:
        """Whether single modules can have sizes of their own (`rank_pattern`)."""
        return self.config_class in ("BoneConfig", "LoraConfig")

    @property
    def peft_type(self) -> str | None:
        """As PEFT calls it, such as "LORA"; None of a bound."""
        return None if self.config_class is None else self.config_class.removesuffix("Config").upper()

    def config(
        self, size: Settings, target_modules: list[str] | str | None, task_type: str | None, settings: Settings
    ) -> Any:
        """A new configuration; PEFT writes into the one that it attaches, so make one for each model.

        Args:
            size: Fields of the size, see `MatchedSize.settings`.
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
        if problems := self._problems(kind, settings):
            raise ConfigError(f"{self.name}: {'; '.join(problems)}")
        fields = {"target_modules": target_modules, "task_type": task_type, **self.defaults, **size, **settings}
        try:
            if self.alpha is not None and "lora_alpha" not in settings:
                fields |= self._alphas(fields, settings)
            config = kind(**{**fields, **self.identity})
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(f"{self.name}: {' '.join(str(error).split())}") from error
        for name, value in self.identity.items():
            if getattr(config, name) != value:
                raise ConfigError(f"{self.name}: {name} would be {getattr(config, name)!r}, which is another method")
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
        is_set = set(self.size_fields) <= set(settings) or settings.keys() & {"rank_pattern", "bottleneck_size"}
        return self.sizes is None or bool(is_set)

    def _problems(self, kind: Any, settings: Settings) -> list[str]:
        """Settings that the configuration has no field for, or that would make this another method."""
        known = [item.name for item in dataclasses.fields(kind) if item.init and item.name not in DECIDED]
        problems = []
        for name, value in settings.items():
            if name in DECIDED:
                problems.append(f"{name} cannot be set ({DECIDED[name]})")
            elif name not in known:
                near = difflib.get_close_matches(name, known, n=2)
                hint = f" (did you mean {' or '.join(near)}?)" if near else ""
                problems.append(f"{self.config_class} has no field {name}{hint}")
            elif value != self.identity.get(name, value):
                problems.append(f"{name}={value!r} would be another method; it is {self.identity[name]!r} here")
        return problems

    def _alphas(self, fields: Settings, settings: Settings) -> dict[str, Any]:
        """The same scale in all layers, also where their ranks differ."""
        assert self.alpha is not None
        alphas: dict[str, Any] = {"lora_alpha": self.alpha * fields.get("r", 8)}  # LoraConfig's default
        if fields.get("rank_pattern") and "alpha_pattern" not in settings:
            alphas["alpha_pattern"] = {name: self.alpha * r for name, r in fields["rank_pattern"].items()}
        return alphas


def _config_class(name: str) -> Any:
    import peft  # first: BONE is registered when peft has been imported

    from flashbone import BoneConfig

    return BoneConfig if name == "BoneConfig" else getattr(peft, name)
