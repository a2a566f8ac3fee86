"""From a method, a size and the user's settings to PEFT's configuration object."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError

if TYPE_CHECKING:
    from flashbone.compare.methods.registry import Method, Size

# Fields that the configurations have and a comparison decides itself.
OURS = {
    "task_type": "the comparison's task decides it",
    "peft_type": "the method decides it",
    "auto_mapping": "PEFT writes it",
    "peft_version": "PEFT writes it",
    "base_model_name_or_path": "the comparison's model decides it",
    "revision": "the comparison's model decides it",
    "inference_mode": "a comparison always trains",
    "runtime_config": "it is no part of the method",
}


def build(
    method: Method,
    size: Size,
    target_modules: list[str] | str | None,
    task_type: str | None,
    settings: Mapping[str, Any],
) -> Any:
    """See `Method.config`."""
    check_settings(method, settings)
    if method.config_class is None:
        return None
    sized: Mapping[str, Any] = size if isinstance(size, Mapping) else {}
    if isinstance(size, int):
        if not method.has_size:
            raise ConfigError(f"{method.name}: it has no size, but got {size}; leave it out")
        sized = {method.size_fields[0]: size}
    fields = {"target_modules": target_modules, "task_type": task_type, **method.defaults, **sized, **settings}
    fields |= method.identity
    _one_size(method, fields)
    _set_alpha(method, fields, settings)
    try:
        return config_class(method)(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{method.name}: {' '.join(str(error).split())}") from error


def config_class(method: Method) -> Any:
    """The class of the method's configuration."""
    import peft  # first, since BONE is registered when peft has been imported

    from flashbone import BoneConfig

    return BoneConfig if method.config_class == "BoneConfig" else getattr(peft, str(method.config_class))


def check_settings(method: Method, settings: Mapping[str, Any]) -> None:
    """Refuse what the method's configuration has no field for, or what would make it another method.

    Raises:
        ConfigError: naming everything that is wrong, with the nearest fields that exist.
    """
    if method.config_class is None:
        if settings:
            raise ConfigError(f"{method.name}: it has no settings, but got {', '.join(settings)}; leave them out")
        return
    known = [item.name for item in dataclasses.fields(config_class(method)) if item.init and item.name not in OURS]
    problems = []
    for name, value in settings.items():
        if name in OURS:
            problems.append(f"{name} cannot be set ({OURS[name]})")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            problems.append(f"{method.config_class} has no field {name}{hint}")
        elif name in method.identity and value != method.identity[name]:
            problems.append(f"{name}={value!r} would be another method; it is {method.identity[name]!r} here")
    problems += _other_start(method, settings)
    if problems:
        raise ConfigError(f"{method.name}: {'; '.join(problems)}")


def _other_start(method: Method, settings: Mapping[str, Any]) -> list[str]:
    """Some methods are named after how they start, and `init_lora_weights` or `init_weights` may ask for another's."""
    problems = []
    start = str(settings.get("init_lora_weights", ""))
    named = start.split("_")[0] if start.split("_")[0] in ("pissa", "olora") else ""
    if start and (named or method.name == "pissa") and named != method.name and method.name != "olora":
        remedy = f"name the method {named}" if named else "'pissa' or 'pissa_niter_16' were wanted"
        problems.append(f"init_lora_weights={start!r} would be another method; {remedy}")
    if settings.get("init_weights") == "bat" and method.config_class == "BoneConfig" and method.name != "bat-col":
        problems.append("init_weights='bat' would be another method; name the method bat-col")
    return problems


def _one_size(method: Method, fields: dict[str, Any]) -> None:
    """OFT and BOFT take the size of a block or the number of blocks; the other has to be zero."""
    pair = {"OFTConfig": ("oft_block_size", "r"), "BOFTConfig": ("boft_block_size", "boft_block_num")}
    block, number = pair.get(str(method.config_class), ("", ""))
    if fields.get(number) and block not in fields:
        fields[block] = 0


def _set_alpha(method: Method, fields: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """The same scale in all layers, also where their ranks differ."""
    if method.alpha is None or "lora_alpha" in settings:
        return
    rank = fields.get("r", 8)  # LoraConfig's own default
    if isinstance(rank, int):
        fields["lora_alpha"] = method.alpha * rank
    if fields.get("rank_pattern") and "alpha_pattern" not in settings:
        fields["alpha_pattern"] = {name: method.alpha * r for name, r in fields["rank_pattern"].items()}
