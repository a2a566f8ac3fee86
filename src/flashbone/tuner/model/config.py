"""BoneConfig: the configuration of the Bone family, in the file format that PEFT 0.14 to 0.18 read and wrote.

Their files name no variant: there `init_weights="bat"` is bat-col, and anything else is bone.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from peft.config import PeftConfig

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.tuner.model.roles import ROLES
from flashbone.variants.orthogonal import DEFAULT_EPS, MAX_EPS, Orthogonal

DEFAULT_R, DEFAULT_VARIANT = 64, "bone"


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
        parameters_to_save: Names (suffixes) of single parameters that are trained as a whole and saved with the
            adapter, such as RWKV-6's "time_decay". Injection turns them into full names.

    Raises:
        ConfigError: a field is out of range or contradicts another.
    """

    r: int = field(default=DEFAULT_R, metadata={"help": "Block size."})
    variant: str = field(default=DEFAULT_VARIANT, metadata={"help": "bone, mini, bat-col, bat-row or orthogonal."})
    init_weights: bool | Literal["bat"] = field(
        default=True, metadata={"help": "True: start at zero. False: at random. 'bat': PEFT's name of bat-col."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    mini_r: int = field(default=1, metadata={"help": "Columns of the block of the variant mini."})
    bottleneck_size: int | None = field(
        default=None, metadata={"help": "Block size of the variant orthogonal, which it asks for."}
    )
    use_orthogonal: bool = field(default=True, metadata={"help": "Whether the block of orthogonal is kept a rotation."})
    orthogonal_eps: float = field(
        default=DEFAULT_EPS, metadata={"help": "Ridge of the Cayley map of orthogonal, in (0, 1e-2]."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, roles or regular expression of the modules to adapt, or 'all-linear'."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of single parameters to adapt, such as fused experts."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or regular expression of the modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, with layers_to_transform."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Block sizes of single modules, by name or regular expression."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'bone_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train as a whole and to save with the adapter."}
    )
    parameters_to_save: list[str] | None = field(
        default=None, metadata={"help": "Single parameters to train as a whole and to save with the adapter."}
    )

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
        if self.init_weights == "bat" and self.variant == "bone":
            self.variant = "bat-col"
        elif self.init_weights is True and self.variant == "bat-col":
            self.init_weights = "bat"
        problems = [*contradictions, *self._problems()]
        if problems:
            raise ConfigError("BoneConfig: " + "; ".join(problems))
        self._make_plain()

    def _make_plain(self) -> None:
        """Numbers of other libraries become Python's, which a file can hold."""
        self.r, self.mini_r = int(self.r), int(self.mini_r)
        self.bottleneck_size = None if self.bottleneck_size is None else int(self.bottleneck_size)
        self.dropout, self.orthogonal_eps = float(self.dropout), float(self.orthogonal_eps)
        self.rank_pattern = {name: int(size) for name, size in self.rank_pattern.items()}

    def _read_bottleneck(self) -> list[str]:
        """Take `bottleneck_size` as what it means; returns what contradicts it. A field that has its default value
        counts as not given."""
        problems = []
        if self.bottleneck_size is not None:
            if self.variant not in (DEFAULT_VARIANT, Orthogonal.name) or self.init_weights == "bat":
                asked = "init_weights='bat'" if self.init_weights == "bat" else f"variant={self.variant!r}"
                problems.append(
                    f"bottleneck_size={self.bottleneck_size} asks for the variant 'orthogonal', but {asked} was given;"
                    " leave one out"
                )
            elif self.r not in (DEFAULT_R, self.bottleneck_size):
                problems.append(f"bottleneck_size={self.bottleneck_size} and r={self.r} are one size; leave r out")
            else:
                self.variant, self.r = Orthogonal.name, self.bottleneck_size
        elif self.variant != Orthogonal.name:
            given = {"use_orthogonal": self.use_orthogonal is not True}
            given["orthogonal_eps"] = self.orthogonal_eps != DEFAULT_EPS
            problems += [
                f"{name}={getattr(self, name)!r} belongs to the variant 'orthogonal', but variant={self.variant!r};"
                " give bottleneck_size, or leave it out"
                for name, is_given in given.items()
                if is_given
            ]
        return problems

    def _problems(self) -> list[str]:
        problems = []

        def check(ok: bool, message: str) -> None:
            if not ok:
                problems.append(message)

        sizes = {"r" if self.bottleneck_size is None else "bottleneck_size": self.r, "mini_r": self.mini_r}
        if isinstance(self.rank_pattern, dict):
            sizes |= {f"rank_pattern[{name!r}]": size for name, size in self.rank_pattern.items()}
        else:
            problems.append(f"rank_pattern: got {self.rank_pattern!r}, wanted a dictionary of names and block sizes")
        for name, size in sizes.items():
            check(_is_positive(size), f"`{name}` should be a positive integer value but the value passed is {size!r}")
        known = ", ".join(map(repr, variants.VARIANTS))
        check(self.variant in list(variants.VARIANTS), f"variant: got {self.variant!r}, wanted one of {known}")
        check(
            self.init_weights in (True, False, "bat"),
            f"init_weights: got {self.init_weights!r}, wanted True, False or 'bat' (variants are chosen by `variant`)",
        )
        check(
            self.init_weights != "bat" or self.variant == "bat-col",
            f"init_weights='bat' means variant='bat-col', but variant={self.variant!r} was asked for; leave one out",
        )
        check(
            isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1,
            f"dropout: got {self.dropout!r}, wanted a probability in [0, 1)",
        )
        check(
            isinstance(self.use_orthogonal, bool), f"use_orthogonal: got {self.use_orthogonal!r}, wanted True or False"
        )
        check(
            isinstance(self.orthogonal_eps, Real) and 0 < self.orthogonal_eps <= MAX_EPS,
            f"orthogonal_eps: got {self.orthogonal_eps!r}, wanted a number in (0, {MAX_EPS}]",
        )
        check(
            self.bias in ("none", "all", "bone_only"), f"bias: got {self.bias!r}, wanted 'none', 'all' or 'bone_only'"
        )
        return problems + self._problems_of_targets()

    def _problems_of_targets(self) -> list[str]:
        problems = []
        if isinstance(self.target_modules, str):
            problems += [
                f"`{name}` cannot be used when `target_modules` is a str."
                for name in ("layers_to_transform", "layers_pattern")
                if getattr(self, name) is not None
            ]
        problems += self._problems_of_parameters()
        patterns = {"rank_pattern": [*self.rank_pattern] if isinstance(self.rank_pattern, dict) else []}
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                patterns[name] = [value]
            elif value is not None and not all(isinstance(entry, str) and entry for entry in value):
                problems.append(f"{name}: got {value!r}, wanted names of modules")
        problems += [
            f"{name}: {pattern!r} is no regular expression ({error})"
            for name, values in patterns.items()
            for pattern in values
            if (error := _pattern_error(pattern)) is not None
        ]
        return problems

    def _problems_of_parameters(self) -> list[str]:
        given = {field: getattr(self, field) for field in ("target_parameters", "parameters_to_save")}
        problems = [
            f"{field}: got {names!r}, wanted a list of names"
            for field, names in given.items()
            if names is not None
            and (not isinstance(names, (list, tuple, set)) or not all(isinstance(n, str) and n for n in names))
        ]
        if problems or not self.target_parameters:
            return problems
        problems = [
            f"{name} does not choose among target_parameters; write the names in full, such as 'layers.0.mlp.experts.x'"
            for name in ("layers_to_transform", "layers_pattern")
            if getattr(self, name) is not None
        ]
        if self.dropout:
            problems.append(
                f"dropout={self.dropout!r} has no place in target_parameters, whose input is not seen; leave it out"
            )
        return problems

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary; bat-col is written as PEFT 0.14 to 0.18 expect it: `init_weights="bat"`, also for
        a random start, which a file does not need any more."""
        fields = super().to_dict()
        if self.variant == "bat-col":
            fields["init_weights"] = "bat"
        if self.bottleneck_size is not None:  # r may have been set since
            fields["bottleneck_size"] = self.r if self.variant == Orthogonal.name else None
        return fields

    @classmethod
    def recommended(cls, model: Any, **overrides: Any) -> BoneConfig:
        """The published settings of the orthogonal variant for a model of this size (docs/adapters.md has the table).

        Args:
            model: A module, a transformers config, or a model's folder or hub id, of which only the config is read.
            **overrides: Fields that win over the published ones. `variant` other than "orthogonal" leaves nothing of
                them: BoneConfig's defaults and the overrides are taken.

        Raises:
            ConfigError: the model has more than 13B parameters, where nothing was published; or there is no such model.
        """
        from flashbone.tuner.model.presets import recommended_fields

        return cls(**recommended_fields(model, overrides))


def _pattern_error(pattern: object) -> str | None:
    try:
        re.compile(pattern)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (re.error, TypeError) as error:
        return str(error)
    return None


def _is_positive(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0
