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

import json
import math
import re
import reprlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashbone.errors import FormatError
from flashbone.files import fields, folders
from flashbone.files.adapter import same_values
from flashbone.files.sources import read_json
from flashbone.files.states import read_state
from flashbone.variants.lowrank import pad

_PARTS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
# Starts that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) change it when PEFT loads the file.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Fields that say nothing about the function of a plain LoRA. What is neither here nor read has to be off.
_NEUTRAL = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config"),
}
_MAX_ALPHA = 1e9
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "modules_to_save"}


@dataclass(frozen=True)
class Lora:
    """What a plain LoRA says, whatever its format: `delta = B A`, so its alpha is its rank.

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
        names = [name for name in self.replacements if name.endswith(".bias") and not self._is_saved(name)]
        if not names:
            return "none"
        return "lora_only" if all(name.removesuffix(".bias") in self.factors for name in names) else "all"

    def without_place(self) -> list[str]:
        """Replacements that a PEFT folder has no place for."""
        return [name for name in self.replacements if not (self._is_saved(name) or _has_own_place(name))]

    def _is_saved(self, parameter: str) -> bool:
        return in_saved_module(parameter, self.modules_to_save)


def in_saved_module(parameter: str, modules: tuple[str, ...]) -> bool:
    """Whether the parameter belongs to a module whose name ends in one of these, as PEFT finds them."""
    parts = parameter.split(".")[:-1]
    return bool(modules) and any(".".join(parts[: n + 1]).endswith(modules) for n in range(len(parts)))


def _has_own_place(parameter: str) -> bool:
    """Whether PEFT loads it without a module to save around it: biases, and embeddings that were resized."""
    module, _, leaf = parameter.rpartition(".")
    return bool(module) and (leaf == "bias" or (leaf == "weight" and module.rpartition(".")[2] in folders.EMBEDDINGS))


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
    for module, (A, B) in lora.factors.items():
        for suffix, (part, is_embedding) in _PARTS.items():
            if is_embedding == (module in lora.embeddings):
                state[f"{folders.ROOT}{module}{suffix}"] = A if part == "A" else B
    for name, tensor in lora.replacements.items():
        module, _, leaf = name.rpartition(".")
        key = f"{module}.base_layer.{leaf}" if module in lora.factors else name
        state[f"{folders.ROOT}{key}"] = tensor
    contiguous = {key: tensor.contiguous().clone() for key, tensor in state.items()}
    save_file(contiguous, folder / folders.SAFETENSORS, metadata={"format": "pt"})
    config = {
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
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / folders.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(path: str | Path) -> Lora:
    """Read PEFT's folder of a plain LoRA; scalings are multiplied into B, in fp32 where they are no powers of two.

    Raises:
        FormatError: something is missing, broken, or more than a plain LoRA; all bad fields, or keys, are named.
    """
    folder = Path(path)
    config = _read_config(folder)
    file = folders.weights_file(folder)
    parts, replacements, embeddings, problems = _sort_keys(read_state(file), config)
    factors = {}
    for module, found in parts.items():
        if wrong := _misshapen(module, found, config):
            problems += wrong
        else:
            factors[module] = found["A"], _scaled(found["B"], *_rank_and_scale(module, config))
    if not parts and not problems:
        problems.append("it holds no lora_A and lora_B")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    rank = max(len(A) for A, _ in factors.values())
    targets = config["target_modules"]
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


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / folders.CONFIG
    if not file.is_file():
        raise FormatError(f"{folder}: this folder is no adapter, it has no {folders.CONFIG}")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{file}: this is a {config.get('peft_type')} adapter, wanted LORA")
    for name, default in {"r": 8, "lora_alpha": 8, "bias": "none", "target_modules": None}.items():
        config.setdefault(name, default)
    for name, default in {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": []}.items():
        config[name] = config.get(name) or default
    for name in ("use_rslora", "fan_in_fan_out"):
        config[name] = config.get(name) or False
    problems = []

    def check(ok: bool, name: str, wanted: str) -> None:
        if not ok:
            problems.append(f"{name}: got {reprlib.repr(config[name])}, wanted {wanted}")

    check(fields.is_size(config["r"]), "r", "a positive integer")
    check(_is_number(config["lora_alpha"]), "lora_alpha", "a number")
    check(isinstance(config["use_rslora"], bool), "use_rslora", "true or false")
    check(isinstance(config["fan_in_fan_out"], bool), "fan_in_fan_out", "true or false")
    check(config["bias"] in ("none", "all", "lora_only"), "bias", "'none', 'all' or 'lora_only'")
    for name in sorted(fields.SHARED.keys() & config.keys()):
        check(fields.SHARED[name][0](config[name]), name, fields.SHARED[name][1])
    check(_is_pattern(config["rank_pattern"], fields.is_size), "rank_pattern", "patterns with positive integers")
    check(_is_pattern(config["alpha_pattern"], _is_number), "alpha_pattern", "patterns with numbers")
    start = config.get("init_lora_weights")
    if not any(start is plain or (start == plain and isinstance(start, str)) for plain in _PLAIN_STARTS):
        problems.append(f"init_lora_weights: {start!r} changes the base, too; save it as a plain LoRA with PEFT first")
    for name in sorted(set(config) - _NEUTRAL - _READ - {"init_lora_weights"}):
        if config[name]:
            problems.append(f"{name}: got {reprlib.repr(config[name])}, which is more than a plain LoRA")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}; merge such an adapter with PEFT (merge_and_unload)")
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_ALPHA


def _is_pattern(value: object, fits: Any) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return isinstance(value, dict) and all(_matcher(key) and fits(number) for key, number in value.items())
    except (re.error, OverflowError, RecursionError):
        return False


def _matcher(key: str) -> re.Pattern[str]:
    """How PEFT looks a module up in a pattern."""
    return re.compile(rf"(.*\.)?({key})$")


def _sort_keys(
    state: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], frozenset[str], list[str]]:
    """Factors by module and part, replacements by parameter, modules that are embeddings, and what is wrong."""
    parts: dict[str, dict[str, Tensor]] = {}
    replacements, embeddings, problems = {}, set(), []
    for key, tensor in state.items():
        name = key.removeprefix(folders.ROOT)
        suffix = next((s for s in _PARTS if name.endswith(s)), "")
        parameter = folders.plain_name(name)
        if name == key or not (suffix or folders.is_replacement(parameter, config)):
            problems.append(f"unknown key {key!r}")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: got {tensor.dtype}, wanted floating point numbers")
        elif suffix:
            part, is_embedding = _PARTS[suffix]
            module = name.removesuffix(suffix)
            if part in parts.setdefault(module, {}):
                problems.append(f"{key}: the file holds two {part} of {module}")
            parts[module][part] = tensor
            embeddings |= {module} if is_embedding else set()
        elif ".original_module." not in name:
            if parameter in replacements and not same_values(replacements[parameter], tensor):
                problems.append(f"{key}: the file holds two different values of {parameter}")
            replacements[parameter] = tensor
    return parts, replacements, frozenset(embeddings), problems


def _misshapen(module: str, found: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    if missing := [part for part in "AB" if part not in found]:
        return [f"{module}: its lora_{missing[0]} is missing"]
    A, B = found["A"], found["B"]
    got = f"{module}: got A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)}"
    if A.ndim > 2 or B.ndim > 2:
        return [f"{got}, those of a convolution, which is not converted; merge it with PEFT"]
    rank = _rank_and_scale(module, config)[0]
    if A.ndim != 2 or B.ndim != 2 or not (len(A) == B.shape[1] == rank and A.numel() and B.numel()):
        return [f"{got}, wanted ({rank}, in) and (out, {rank})"]
    return []


def _rank_and_scale(module: str, config: dict[str, Any]) -> tuple[int, float]:
    def value(pattern: dict[str, Any], default: Any) -> Any:
        return next((v for key, v in pattern.items() if _matcher(key).match(module)), default)

    rank, alpha = value(config["rank_pattern"], config["r"]), value(config["alpha_pattern"], config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _scaled(B: Tensor, rank: int, scale: float) -> Tensor:
    """`B * scale`: in B's dtype where nothing is rounded, else in fp32 at least."""
    exact = B.double() * scale
    return exact.to(
        B.dtype if torch.equal(exact.to(B.dtype).double(), exact) else torch.promote_types(B.dtype, torch.float32)
    )
