"""Plain LoRAs: two factors for each layer, which every engine that serves adapters takes.

adapter_config.json          peft_type "LORA", r, lora_alpha = r, target_modules, fan_in_fan_out, ...
adapter_model.safetensors:
    base_model.model.<module>.lora_A.weight         (rank, in)
    base_model.model.<module>.lora_B.weight         (out, rank)
    base_model.model.<module>.lora_embedding_A      (rank, ids), of an embedding
    base_model.model.<module>.lora_embedding_B      (dim, rank)
    base_model.model.<module>[.base_layer].bias     a trained bias
    base_model.model.<parameter>                    a parameter of a module to save
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files import cards, fields, folders
from flashbone.files.fields import ConfigField
from flashbone.files.formats import AdapterCard, AdapterFormat
from flashbone.files.states import read_state
from flashbone.variants.lowrank import pad

_OF_LINEAR, _OF_EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
_MAX_ALPHA = 1e9
_MERGE = "merge such an adapter with PEFT (merge_and_unload)"
_OFF = ConfigField(lambda v: not v, f"false, as a plain LoRA has; {_MERGE}", False)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_ALPHA


_SCHEMA = fields.SHARED | {
    "r": fields.size(8),
    "lora_alpha": ConfigField(_is_number, "a number", 8),
    "use_rslora": fields.flag(False),
    "fan_in_fan_out": fields.flag(False),
    "bias": fields.bias("lora_only"),
    "rank_pattern": fields.patterned(fields.is_size, "positive integers"),
    "alpha_pattern": fields.patterned(_is_number, "numbers"),
    "init_lora_weights": ConfigField(
        lambda v: isinstance(v, bool) or v in ("gaussian", "eva", "orthogonal"),
        "one that leaves the base unchanged, unlike PiSSA, OLoRA and others; save it as a plain LoRA with PEFT first",
        True,
    ),
    "lora_dropout": ConfigField(lambda v: True, "anything", 0.0),
    "use_dora": _OFF,
    "lora_bias": _OFF,
    # These do not change the function of a plain LoRA.
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"), fields.ANY),
    **dict.fromkeys(("qalora_group_size", "ensure_weight_tying", "runtime_config"), fields.ANY),
}


@dataclass(frozen=True)
class Lora:
    """A plain LoRA, whatever its format: `delta = B A`, so its alpha is its rank.

    Attributes:
        factors: module name in the base model -> A (rank, in) and B (out, rank); all have one rank.
        replacements: as in `Adapter`.
        base_model: folder or hub id of the model that it belongs to, if known.
        base_config: that model's config.json, empty if not known.
        conv1d: names of `factors` whose weight is stored as (in, out) in a layer (PEFT's `fan_in_fan_out`).
        embeddings: names of `factors` that are embedding tables: A (rank, ids), B (dim, rank).
        target_modules: endings of names that mean the modules of `factors` and no others; empty: their full names.
        modules_to_save: endings of names of the modules that `replacements` holds as a whole.
        task_type: PEFT's, such as "CAUSAL_LM".
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    replacements: dict[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    base_config: dict[str, Any] = field(default_factory=dict)
    conv1d: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None

    @property
    def rank(self) -> int:
        """Rows of every A."""
        return max(A.shape[0] for A, _ in self.factors.values())

    @property
    def bias(self) -> str:
        """Which biases `replacements` holds besides those of modules to save: "none", "lora_only" or "all"."""
        names = [name for name in self.replacements if name.endswith(".bias")]
        names = [name for name in names if not folders.in_saved_module(name, self.modules_to_save)]
        if not names:
            return "none"
        return "lora_only" if all(name.removesuffix(".bias") in self.factors for name in names) else "all"

    def without_place(self) -> list[str]:
        """Replacements that a PEFT folder has no place for: neither biases nor embeddings nor in modules to save."""
        config = {"bias": "all", "modules_to_save": self.modules_to_save}
        return [name for name in self.replacements if not folders.is_replacement(name, config)]


def write(lora: Lora, folder: Path) -> None:
    """Write PEFT's folder of a plain LoRA: alpha = r, one rank, no DoRA, no rsLoRA, as serving engines want it.

    Raises:
        FormatError: it holds tensors that such a folder has no place for; nothing was written.
    """
    if lost := lora.without_place():
        raise FormatError(
            f"{folder}: a LoRA has no place for {', '.join(lost)}, which are neither biases nor whole modules; merge"
            " the adapter instead (flashbone merge)"
        )
    state = {}
    for module, pair in lora.factors.items():
        suffixes = _OF_EMBEDDING if module in lora.embeddings else _OF_LINEAR
        state |= {f"{folders.ROOT}{module}{suffix}": factor for suffix, factor in zip(suffixes, pair, strict=True)}
    for name, tensor in lora.replacements.items():
        module, _, leaf = name.rpartition(".")
        key = f"{module}.base_layer.{leaf}" if module in lora.factors else name
        state[f"{folders.ROOT}{key}"] = tensor
    config = fields.defaults(_SCHEMA) | {
        "peft_type": "LORA",
        "task_type": lora.task_type,
        "base_model_name_or_path": lora.base_model,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "target_modules": sorted(lora.target_modules or lora.factors),
        "modules_to_save": list(lora.modules_to_save) or None,
        "bias": lora.bias,
        "fan_in_fan_out": len(lora.conv1d) * 2 > len(lora.factors) - len(lora.embeddings),
        "inference_mode": True,
    }
    folders.write_folder(folder, config, state)


def read(path: str | Path) -> Lora:
    """Read PEFT's folder of a plain LoRA; scalings are multiplied into B, in fp32 where they are no powers of two.

    Raises:
        FormatError: something is missing, broken, or more than a plain LoRA; all bad fields, or keys, are named.
    """
    folder = Path(path)
    unknown = f"fields that are more than a plain LoRA: {{}}; {_MERGE}"
    config = fields.checked(folder / folders.CONFIG, folders.read_config(folder, "LORA"), _SCHEMA, unknown)
    file = folders.weights_file(folder)
    parts, replacements, problems = folders.sort_tensors(read_state(file), config, (*_OF_LINEAR, *_OF_EMBEDDING))
    factors, misfits = _factors(parts, config)
    problems += misfits
    if not parts and not problems:
        problems.append("it holds no lora_A and lora_B")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    embeddings = frozenset(module for module, tensors in parts.items() if _OF_EMBEDDING[0] in tensors)
    rank = max(len(A) for A, _ in factors.values())
    targets = config.get("target_modules")
    restricted = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    return Lora(
        {module: (A, B) if len(A) == rank else pad(A, B, rank) for module, (A, B) in factors.items()},
        replacements,
        config.get("base_model_name_or_path") or None,
        conv1d=frozenset(factors) - embeddings if config["fan_in_fan_out"] else frozenset(),
        embeddings=embeddings,
        target_modules=tuple(targets) if isinstance(targets, list) and not restricted else (),
        modules_to_save=tuple(config["modules_to_save"]),
        task_type=config.get("task_type"),
    )


def _factors(
    parts: dict[str, dict[str, Tensor]], config: dict[str, Any]
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """A and B of each module, with the scaling in B; and what is wrong with others."""
    factors, problems = {}, []
    for module, tensors in parts.items():
        rank = fields.by_pattern(module, config["rank_pattern"], config["r"])
        alpha = fields.by_pattern(module, config["alpha_pattern"], config["lora_alpha"])
        suffixes = _OF_EMBEDDING if _OF_EMBEDDING[0] in tensors else _OF_LINEAR
        if tensors.keys() != set(suffixes):
            got, wanted = (" and ".join(suffix[1:] for suffix in keys) for keys in (tensors, suffixes))
            problems.append(f"{module}: the file holds its {got}, wanted {wanted}")
            continue
        A, B = (tensors[suffix] for suffix in suffixes)
        if wrong := _misfit(A, B, rank):
            problems.append(f"{module}: got A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)}, {wrong}")
        else:
            factors[module] = A, _scaled(B, alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
    return factors, problems


def _misfit(A: Tensor, B: Tensor, rank: int) -> str:
    """What is wrong with the shapes of two factors; empty if nothing is."""
    if A.ndim > 2 or B.ndim > 2:
        return "those of a convolution, which is not converted; merge it with PEFT"
    fits = A.ndim == B.ndim == 2 and len(A) == B.shape[1] == rank and A.numel() and B.numel()
    return "" if fits else f"wanted ({rank}, in) and (out, {rank})"


def _scaled(B: Tensor, scale: float) -> Tensor:
    """`B * scale`: in B's dtype where nothing is rounded, else in fp32 at least."""
    exact = B.double() * scale
    is_exact = torch.equal(exact.to(B.dtype).double(), exact)
    return exact.to(B.dtype if is_exact else torch.promote_types(B.dtype, torch.float32))


def _usage(card: AdapterCard) -> str:
    return cards.part("Load", "Any version of PEFT:", cards.load(card))


FORMAT = AdapterFormat("lora", Lora, read, write, _usage, peft_type="LORA")
