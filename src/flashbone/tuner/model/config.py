"""BoneConfig: the configuration of the Bone family, in the file format that PEFT 0.14 to 0.18 read and wrote.

Their files name no variant: there `init_weights="bat"` is bat-col, and anything else is bone.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from peft.config import PeftConfig

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.files import patterns
from flashbone.tuner.model.roles import ROLES
from flashbone.variants.orthogonal import DEFAULT_EPS, MAX_EPS

DEFAULT_R, DEFAULT_VARIANT = 64, variants.DEFAULT
_BOTTLENECK = variants.of_size_field("bottleneck_size").name
_BY_INIT = variants.by_tool_name("peft_init_weights")


class BoneType(str, enum.Enum):
    """The PEFT type of the family. PEFT's own enum lost this member; a str member equals and hashes like its string,
    which is all that PEFT's tables need."""

    BONE = "BONE"


@dataclass
class BoneConfig(PeftConfig):
    """How a model is adapted with the Bone family (arXiv 2409.15371).

    Args:
        r: Block size (64): rows of the shared matrix of `bone` and `mini`, edge of the square blocks of `bat-*` and
            `orthogonal`.
        variant: "bone" (the default), "mini", "bat-col", "bat-row" or "orthogonal"; the formulas are in docs/maths.md.
        init_weights: True starts at zero (the model is unchanged), False at random (for tests). "bat" is PEFT's
            spelling of `variant="bat-col"`.
        dropout: Probability with which entries of the input are dropped before they enter the adapter (never the base).
        mini_r: Columns of the block of `mini`, tiled along the output features.
        bottleneck_size: The block size of the orthogonal variant: `bottleneck_size=k` means
            `variant="orthogonal", r=k`.
        use_orthogonal: Whether the block of `orthogonal` is kept a rotation, Q, by a Cayley map; False: I + block.
        orthogonal_eps: Ridge of the Cayley map (1e-6), in (0, 1e-2]: entries of Q^T Q - I stay under 2 eps + eps^2.
        target_modules: Names (suffixes) of the modules to adapt, a regular expression, or "all-linear". None takes
            PEFT's table for the model's type, and "all-linear" for models that it does not know. Names may also be
            containers, such as "layers.3", and roles, such as "attention.output": docs/adapters.md, Where adapters go.
        target_parameters: Names (suffixes) of single parameters to adapt, (out, in) or fused experts (experts, out, in)
            with a block for each expert: ["experts.gate_up_proj"]. `target_modules=None` then adapts no modules.
        exclude_modules: Names or a regular expression of modules that stay as they are.
        layers_to_transform: Index or indices of the layers to adapt; the others stay as they are.
        layers_pattern: Name of the list that holds the layers, used with `layers_to_transform`.
        rank_pattern: Block sizes of single modules, by name or regular expression: {"mlp.down_proj": 32}.
        bias: Which biases are trained along: "none", "all" or "bone_only" (those of adapted layers).
        modules_to_save: Modules that are trained as a whole and saved with the adapter, such as a new classifier.
        trainable_token_indices: Ids of tokens whose rows of the embedding are trained along, or ids by the name of an
            embedding: {"embed_tokens": [32000, 32001]}. TRL sets it where it adds tokens.
        ensure_weight_tying: Whether rows of tied embeddings stay tied, see PEFT's LoraConfig.
        parameters_to_save: Names (suffixes) of single parameters of an RWKV model of flashbone that are trained as a
            whole and saved with the adapter, such as "time_decay". Injection turns them into full names.

    Raises:
        ConfigError: a field is out of range or contradicts another.
    """

    r: int = DEFAULT_R
    variant: str = DEFAULT_VARIANT
    init_weights: bool | Literal["bat"] = True
    dropout: float = 0.0
    mini_r: int = 1
    bottleneck_size: int | None = None
    use_orthogonal: bool = True
    orthogonal_eps: float = DEFAULT_EPS
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None
    parameters_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BoneType.BONE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.target_modules in ROLES and (self.layers_to_transform, self.layers_pattern) != (None, None):
            self.target_modules = {str(self.target_modules)}
        self.rank_pattern = self.rank_pattern or {}
        contradictions = self._read_bottleneck()
        if isinstance(self.init_weights, str) and self.init_weights in _BY_INIT and self.variant == DEFAULT_VARIANT:
            self.variant = _BY_INIT[self.init_weights].name
        elif self.init_weights is True:
            self.init_weights = _peft_init(self.variant) or True
        if problems := [*contradictions, *self._problems(), *self._problems_of_targets()]:
            raise ConfigError("BoneConfig: " + "; ".join(problems))
        # Numbers of other libraries become Python's, which a file can hold.
        self.r, self.mini_r = int(self.r), int(self.mini_r)
        self.bottleneck_size = None if self.bottleneck_size is None else int(self.bottleneck_size)
        self.dropout, self.orthogonal_eps = float(self.dropout), float(self.orthogonal_eps)
        self.rank_pattern = {name: int(size) for name, size in self.rank_pattern.items()}

    def _read_bottleneck(self) -> list[str]:
        """Set the fields that `bottleneck_size` means; returns what contradicts it. A default counts as not set."""
        if self.bottleneck_size is None:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            return [
                f"{name}={getattr(self, name)!r} belongs to the variant {kind.name!r}, but variant={self.variant!r};"
                " give bottleneck_size, or leave it out"
                for kind in variants.VARIANTS.values()
                for name in kind.config_fields
                if kind.name != self.variant and getattr(self, name) != defaults[name]
            ]
        if self.variant not in (DEFAULT_VARIANT, _BOTTLENECK) or isinstance(self.init_weights, str):
            named = isinstance(self.init_weights, str)
            other = f"init_weights={self.init_weights!r}" if named else f"variant={self.variant!r}"
            return [
                f"bottleneck_size={self.bottleneck_size} asks for the variant {_BOTTLENECK!r}, but {other} was given;"
                " leave one out"
            ]
        if self.r not in (DEFAULT_R, self.bottleneck_size):
            return [f"bottleneck_size={self.bottleneck_size} and r={self.r} are one size; leave r out"]
        self.variant, self.r = _BOTTLENECK, self.bottleneck_size
        return []

    def _problems(self) -> Iterator[str]:
        sizes = {"r" if self.bottleneck_size is None else "bottleneck_size": self.r, "mini_r": self.mini_r}
        if isinstance(self.rank_pattern, dict):
            sizes |= {f"rank_pattern[{name!r}]": size for name, size in self.rank_pattern.items()}
        else:
            yield f"rank_pattern: got {self.rank_pattern!r}, wanted a dictionary of names and block sizes"
        for name, size in sizes.items():
            if not isinstance(size, Integral) or isinstance(size, bool) or int(size) < 1:
                yield f"`{name}` should be a positive integer value but the value passed is {size!r}"
        if self.variant not in list(variants.VARIANTS):
            yield f"variant: got {self.variant!r}, wanted one of {', '.join(map(repr, variants.VARIANTS))}"
        if self.init_weights not in (True, False, "bat"):
            yield f"init_weights: got {self.init_weights!r}, wanted True, False or 'bat'; choose variants by `variant`"
        meant = _BY_INIT.get(self.init_weights) if isinstance(self.init_weights, str) else None
        if meant is not None and self.variant != meant.name:
            yield (
                f"init_weights={self.init_weights!r} means variant={meant.name!r}, but variant={self.variant!r} was"
                " given; leave one out"
            )
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            yield f"dropout: got {self.dropout!r}, wanted a probability in [0, 1)"
        if not isinstance(self.use_orthogonal, bool):
            yield f"use_orthogonal: got {self.use_orthogonal!r}, wanted True or False"
        if not (isinstance(self.orthogonal_eps, Real) and 0 < self.orthogonal_eps <= MAX_EPS):
            yield f"orthogonal_eps: got {self.orthogonal_eps!r}, wanted a number in (0, {MAX_EPS}]"
        if self.bias not in ("none", "all", "bone_only"):
            yield f"bias: got {self.bias!r}, wanted 'none', 'all' or 'bone_only'"

    def _problems_of_targets(self) -> Iterator[str]:
        layer_fields = [name for name in ("layers_to_transform", "layers_pattern") if getattr(self, name) is not None]
        if isinstance(self.target_modules, str):
            yield from (f"`{name}` cannot be used when `target_modules` is a str." for name in layer_fields)
        for name in ("target_parameters", "parameters_to_save"):
            if (names := getattr(self, name)) is not None and not _are_names(names, (list, tuple, set)):
                yield f"{name}: got {names!r}, wanted a list of names"
        if self.target_parameters:
            yield from (
                f"{name} does not choose among target_parameters; write the names in full, such as"
                " 'layers.0.mlp.experts.x'"
                for name in layer_fields
            )
            if self.dropout:
                yield f"dropout={self.dropout!r} cannot be applied to target_parameters, whose input is unknown"
        texts = {"rank_pattern": [*self.rank_pattern] if isinstance(self.rank_pattern, dict) else []}
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                texts[name] = [value]
            elif value is not None and not _are_names(value, object):
                yield f"{name}: got {value!r}, wanted names of modules"
        texts["modules_to_save"] = self.modules_to_save if isinstance(self.modules_to_save, (list, tuple)) else []
        for name, values in texts.items():  # PEFT reads modules_to_save as patterns, too
            for pattern in values:
                is_text, is_key = isinstance(pattern, str), name == "rank_pattern"
                if problem := patterns.problem(pattern, is_key) if is_text else "not a regular expression":
                    yield f"{name}: {pattern!r} is {problem}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary. bat-col is written as PEFT 0.14 to 0.18 expect it, as `init_weights="bat"`."""
        fields = super().to_dict()
        if isinstance(init := _peft_init(self.variant), str):
            fields["init_weights"] = init
        if self.bottleneck_size is not None:  # r may have changed since
            fields["bottleneck_size"] = self.r if self.variant == _BOTTLENECK else None
        return fields

    @classmethod
    def recommended(cls, model: Any, **overrides: Any) -> BoneConfig:
        """The published settings of the orthogonal variant for a model of this size (docs/adapters.md has the table).

        Args:
            model: A module, a transformers config, or a model's folder or hub id; only the config is read.
            **overrides: Fields that replace the published ones. With a `variant` other than "orthogonal", nothing was
                published, and all other fields have their defaults.

        Raises:
            ConfigError: the model has more than 13B parameters, where nothing was published; or it does not exist.
        """
        from flashbone.tuner.model.presets import recommended_fields

        return cls(**recommended_fields(model, overrides))


def _are_names(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and all(isinstance(name, str) and name for name in value)


def _peft_init(variant: str) -> bool | Literal["bat"] | None:
    return variants.VARIANTS[variant].peft_init_weights if variant in list(variants.VARIANTS) else None
