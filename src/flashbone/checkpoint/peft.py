"""Adapter folders of PEFT: BONE as PEFT 0.14 to 0.18 wrote it, and as flashbone writes it. Nothing of PEFT is imported.

adapter_config.json          peft_type "BONE", r, variant (ours) or init_weights (PEFT's own), rank_pattern, bias, ...
adapter_model.safetensors    or adapter_model.bin:
    base_model.model.<module>.bone_block            the block of an adapted module, or parameter (target_parameters)
    base_model.model.<module>.bone_transposed       the same where the weight is stored as (in, out): embeddings
    base_model.model.<module>[.base_layer].bias     a trained bias
    base_model.model.<parameter>                    a parameter of a module to save
"""

import re
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from flashbone import variants
from flashbone.checkpoint import Adapter, same_values
from flashbone.checkpoint.states import read_state
from flashbone.errors import FormatError
from flashbone.sources import read_json
from flashbone.variants.orthogonal import DEFAULT_EPS, MAX_EPS, Orthogonal

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
ROOT = "base_model.model."
BLOCK, BLOCK_OF_TRANSPOSED = ".bone_block", ".bone_transposed"
# PEFT saves embeddings along with the adapter when they are targeted or were resized, listed nowhere.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")
DEFAULTS = {
    "rank_pattern": {},
    "mini_r": 1,
    "use_orthogonal": True,
    "orthogonal_eps": DEFAULT_EPS,
    "bias": "none",
    "modules_to_save": [],
    "target_parameters": [],
}


def read(path: str | Path) -> Adapter:
    """Read an adapter folder whole; tensors are on the CPU, in the file's dtypes.

    Raises:
        FormatError: something is missing, broken or unknown; all bad fields, or all bad keys, are named at once.
    """
    folder = Path(path)
    config = _read_config(folder)
    variant = _variant(folder / CONFIG, config)
    file = weights_file(folder)
    blocks, replacements, transposed, problems = _sort_keys(read_state(file), config)
    problems += [p for module, block in blocks.items() for p in _block_problems(module, block, variant, config)]
    if not blocks and not problems:
        problems.append("it holds no bone_block")
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")
    parameters = frozenset(name for name in blocks if _is_parameter(name, config))
    base = config.get("base_model_name_or_path") or None
    return Adapter(variant, blocks, replacements, config, base, transposed, parameters)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not folder.is_dir():
        what = "is a file, wanted the adapter's folder" if folder.exists() else "no such adapter folder"
        raise FormatError(f"{folder}: {what}")
    if not file.is_file():
        raise FormatError(f"{folder}: this folder is no adapter, it has no {CONFIG}")
    config = read_json(file)
    kind = config.get("peft_type")
    if kind != "BONE":
        raise FormatError(f"{file}: this is a {kind} adapter; flashbone merges BONE")
    _check_fields(file, config)
    return config


def _check_fields(file: Path, config: dict[str, Any]) -> None:
    config.setdefault("r", 64)
    if config.get("bottleneck_size") is not None and config["r"] == 64:
        config["r"] = config["bottleneck_size"]  # the orthogonal variant's spelling of r
    for name, default in DEFAULTS.items():
        if config.get(name) is None:
            config[name] = copy(default)
    problems = []

    def check(ok: bool, name: str, wanted: str) -> None:
        if not ok:
            problems.append(f"{name}: got {config[name]!r}, wanted {wanted}")

    check(_is_size(config["r"]), "r", "a positive integer")
    bottleneck = config.get("bottleneck_size")
    check(bottleneck in (None, config["r"]), "bottleneck_size", f"r, which is {config['r']!r}")
    check(_is_size(config["mini_r"]), "mini_r", "a positive integer")
    check(isinstance(config["use_orthogonal"], bool), "use_orthogonal", "true or false")
    eps = config["orthogonal_eps"]
    check(isinstance(eps, float) and 0 < eps <= MAX_EPS, "orthogonal_eps", f"a number in (0, {MAX_EPS}]")
    check(config["bias"] in ("none", "all", "bone_only"), "bias", "'none', 'all' or 'bone_only'")
    modules = config["modules_to_save"]
    check(isinstance(modules, list) and all(isinstance(m, str) and m for m in modules), "modules_to_save", "names")
    targets = config["target_parameters"]
    check(isinstance(targets, list) and all(isinstance(t, str) and t for t in targets), "target_parameters", "names")
    pattern = config["rank_pattern"]
    check(
        isinstance(pattern, dict) and all(_is_pattern(k) and _is_size(v) for k, v in pattern.items()),
        "rank_pattern",
        "regular expressions with positive integers",
    )
    if problems:
        raise FormatError(f"{file}: {'; '.join(problems)}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _variant(file: Path, config: dict[str, Any]) -> variants.Variant:
    """Named by `variant`; PEFT 0.14 to 0.18 have no such field and mean bat-col by `init_weights="bat"`, else bone.
    As in a BoneConfig, a `bottleneck_size` means orthogonal."""
    name, is_bat = config.get("variant") or "bone", config.get("init_weights") == "bat"
    if is_bat and name == "bone":
        name = "bat-col"
    elif config.get("bottleneck_size") is not None and name == "bone":
        name = Orthogonal.name
    if name not in variants.VARIANTS:
        known = ", ".join(map(repr, variants.VARIANTS))
        raise FormatError(f"{file}: variant: got {name!r}, wanted one of {known}; was it written by a newer flashbone?")
    if is_bat and name != "bat-col":
        raise FormatError(f"{file}: init_weights 'bat' means the variant 'bat-col', but variant is {name!r}")
    if name != Orthogonal.name:
        return variants.get(name)
    return variants.get(name, use_orthogonal=config["use_orthogonal"], eps=config["orthogonal_eps"])


def weights_file(folder: Path) -> Path:
    """The file of an adapter folder that holds its tensors.

    Raises:
        FormatError: there is none.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise FormatError(f"{folder}: this adapter has no weights, wanted {SAFETENSORS} or {PICKLE}")


def _sort_keys(
    state: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], frozenset[str], list[str]]:
    """Blocks by module, replacements by parameter, modules of transposed weights, and what is wrong with the keys."""
    blocks, replacements, transposed, problems = {}, {}, set(), []
    for key, tensor in state.items():
        name = key.removeprefix(ROOT)
        suffix = next((s for s in (BLOCK, BLOCK_OF_TRANSPOSED) if name.endswith(s)), "")
        module, is_block = name.removesuffix(suffix), bool(suffix)
        parameter = _plain_name(name)
        if name == key or not (is_block or _is_replacement(parameter, config)):
            problems.append(f"unknown key {key!r}")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: got {tensor.dtype}, wanted floating point numbers")
        elif module in blocks and is_block:
            problems.append(f"{key}: the file holds two blocks of {module}")
        elif is_block:
            blocks[module] = tensor
            transposed |= {module} if suffix == BLOCK_OF_TRANSPOSED else set()
        elif ".original_module." not in name:  # the frozen twin of a module to save, which `bias="all"` sweeps up
            if parameter in replacements and not same_values(replacements[parameter], tensor):
                problems.append(f"{key}: the file holds two different values of {parameter}")
            replacements[parameter] = tensor
    return blocks, replacements, frozenset(transposed), problems


def _is_parameter(name: str, config: dict[str, Any]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in config["target_parameters"])


def _plain_name(name: str) -> str:
    """The parameter's name in the bare model: without the names of PEFT's wrappers."""
    return re.sub(r"\.(base_layer|modules_to_save|original_module)(?=\.)", "", name)


def _is_replacement(parameter: str, config: dict[str, Any]) -> bool:
    module, _, leaf = parameter.rpartition(".")
    if leaf == "bias" and config["bias"] != "none":
        return True
    if leaf in ("weight", "bias") and module.rpartition(".")[2] in EMBEDDINGS:
        return True
    parts = module.split(".")
    prefixes = (".".join(parts[: n + 1]) for n in range(len(parts)))
    # PEFT wraps every module whose name ends in an entry, and saves all that is inside.
    return bool(module) and any(p.endswith(tuple(config["modules_to_save"])) for p in prefixes)


def _block_problems(module: str, block: Tensor, variant: variants.Variant, config: dict[str, Any]) -> list[str]:
    where = f"{module}{BLOCK}"
    wanted_dimensions = variants.dimensions(variant)
    shape = tuple(block.shape)
    stacked = _is_parameter(module, config) and block.ndim == wanted_dimensions + 1  # one for each expert
    if block.ndim != wanted_dimensions + stacked or not all(shape):
        return [f"{where}: got shape {shape}, a {variant.name} block has {wanted_dimensions} axes, none of them empty"]
    r = next((v for k, v in config["rank_pattern"].items() if re.match(rf"(.*\.)?({k})$", module)), config["r"])
    problems = []
    if shape[-2] != r or (wanted_dimensions == 3 and shape[-1] != r):
        problems.append(f"{where}: got shape {shape}, but {CONFIG} says r={r}")
    if variant.name == "mini" and shape[-1] != config["mini_r"]:
        problems.append(f"{where}: got shape {shape}, but {CONFIG} says mini_r={config['mini_r']}")
    return problems


def write(adapter: Adapter, folder: Path) -> None:
    raise NotImplementedError
