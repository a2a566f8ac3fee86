"""A model's modules without its weights: built from its configuration on torch's meta device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from flashbone.errors import ConfigError
from flashbone.files import claims
from flashbone.files.sources import hub_problem, is_hub_id, read_json

CONFIG = "config.json"
# What transformers raises when fields are contradictory or meaningless.
_BAD_FIELDS = (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError, ZeroDivisionError)


# PEFT's task type -> the class with the head that `flashbone train` loads for it.
_HEADS: dict[str, Any] = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}


def language_class(config: PretrainedConfig) -> Any:
    """The Auto class of language models of this type: of some that see images, too, it is another one."""
    is_of_images = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if is_of_images else AutoModelForCausalLM


def skeleton(
    source: PretrainedConfig | str | Path, dtype: torch.dtype | None = None, task_type: str | None = None
) -> nn.Module:
    """The model that a configuration describes, on the meta device: names and shapes of everything, no weights.

    A config that is passed is copied, not changed.

    Args:
        source: A config, a folder with a config.json, that file itself, or a hub id. No weights are read or downloaded.
        dtype: Dtype of the parameters; None takes the config's, or fp32.
        task_type: "SEQ_CLS" and "CAUSAL_LM" take the model type's class with that head, as training does; others take
            the class that the config names.

    Raises:
        ConfigError: the folder, file or model does not exist, or transformers has no class for it.
    """
    if not isinstance(source, PretrainedConfig | str | Path):
        raise ConfigError(f"got {source!r}, wanted a model, its config, its folder, or a hub id")
    # Building writes dtype and attention into the config and those inside it.
    config = copy.deepcopy(source) if isinstance(source, PretrainedConfig) else load_config(source)
    stored: Any = config.dtype
    try:
        with torch.device("meta"):
            return _build(config, dtype or stored or torch.float32, task_type)
    except _BAD_FIELDS as error:
        raise ConfigError(f"{_name(source)}: its modules cannot be built from the config: {_reason(error)}") from error


def load_config(source: str | Path) -> PretrainedConfig:
    """The configuration in a folder, in a config.json, or on the hub (offline: in its cache).

    Raises:
        ConfigError: it does not exist, or transformers does not know the model's type.
        FormatError: it is not JSON.
    """
    file = _config_file(source)
    fields = read_json(file)
    claims.check(file, fields)
    model_type = fields.get("model_type")
    kind = model_type if isinstance(model_type, str) else ""
    if kind not in CONFIG_MAPPING:
        if fields.get("auto_map"):
            why = "needs Python code of its own (auto_map), which is never run here; load the model and pass that"
        else:
            why = f"transformers {transformers.__version__} does not know it"
        raise ConfigError(f"{file}: model_type {kind!r}: {why}" if kind else f"{file}: it names no model_type")
    try:
        config = CONFIG_MAPPING[kind].from_pretrained(str(file))  # reads this file alone
    except (StrictDataclassError, OSError, *_BAD_FIELDS) as error:
        raise ConfigError(f"{file}: {_reason(error)}") from error
    config.name_or_path = ""  # PEFT would look there for a config again
    return config


def _build(config: PretrainedConfig, dtype: torch.dtype, task_type: str | None) -> nn.Module:
    """The model with the task's head; else of the class that the config names, if transformers has it; else a causal
    language model of that type, if one exists; else the bare model."""
    if task_type in _HEADS:
        auto = language_class(config) if task_type == "CAUSAL_LM" else _HEADS[task_type]
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)
    for name in config.architectures or []:
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class._from_config(config, dtype=dtype)
    auto: Any = AutoModelForCausalLM if _is_causal(config) else AutoModel
    return auto.from_config(config, dtype=dtype, trust_remote_code=False)


def _is_causal(config: PretrainedConfig) -> bool:
    """Whether models of this type generate text. BERT and similar types have causal classes, too, but do not count."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(config, "is_decoder", None) is not False


def _config_file(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".json":
            raise ConfigError(f"{source}: is a file; a folder with a {CONFIG}, that file, or a hub id was wanted")
        return path
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ConfigError(f"{source}: the folder has no {CONFIG}, so it does not say what model it holds")
        return path / CONFIG
    if isinstance(source, Path) or not is_hub_id(source):
        raise ConfigError(f"{source}: no such folder or file; a model's folder, its {CONFIG} or a hub id was wanted")
    return _from_hub(source)


def _from_hub(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, CONFIG, local_files_only=constants.is_offline_mode()))
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ConfigError(f"{name}: this model on the hub has no {CONFIG}") from error
        raise ConfigError(hub_problem(name, error)) from error


def _reason(error: Exception) -> str:
    """The first line of another library's error, with the error's type where the line alone is unclear. A dataclass
    that checks its fields needs two lines: which field, and why."""
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    message = " ".join(lines[: 2 if isinstance(error, StrictDataclassError) else 1])
    if message and not isinstance(error, (KeyError, AttributeError, ZeroDivisionError)):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def _name(source: PretrainedConfig | str | Path) -> str:
    return type(source).__name__ if isinstance(source, PretrainedConfig) else str(source)
