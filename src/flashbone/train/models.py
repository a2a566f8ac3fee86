"""Loading a model: from a folder, a hub id, a .gguf file or an RWKV model's .pth file, ready to adapt and save."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError
from flashbone.files import claims, gguf_head
from flashbone.files.sources import hub_problem, read_json, refuse_special
from flashbone.train.recipe import Quantization, Recipe, is_pth, quantization_of
from flashbone.train.tasks import TASKS
from flashbone.tuner.model.skeleton import language_class, skeleton

log = logging.getLogger(__name__)


def load_causal_lm(name: str, dtype: Any, **kwargs: Any) -> Any:
    """The language model in `dtype`.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    if is_pth(name):
        from flashbone.rwkv import from_pth

        return from_pth(Path(name).expanduser(), **{"dtype": dtype, **kwargs})
    from transformers import AutoModelForCausalLM

    place, gguf = locate(name)
    of_config = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    auto = AutoModelForCausalLM if gguf else language_class(load_config(name, **of_config))
    model = load(auto, name, place, **{"dtype": dtype, **gguf, **kwargs})
    return _plain(model, name) if gguf else model


def load_classifier(
    name: str, dtype: Any, labels: list[str], tokenizer: Any, warn_of_new_head: bool = True, **kwargs: Any
) -> Any:
    """The model with a classification head for `labels`; the head is new where the checkpoint has none that fits.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    place, gguf = locate(name)
    head = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "ignore_mismatched_sizes": True,
    }
    with _load_report(warn_of_new_head):
        model = load(AutoModelForSequenceClassification, name, place, dtype=dtype, **head, **gguf, **kwargs)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify at the last token before the padding
    return _plain(model, name) if gguf else model


def load_layout(name: str) -> Any:
    """The classifier on the meta device, without its weights; its parameters are marked where the checkpoint has them.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    with _load_report(False), suppress(ConfigError):
        return load(AutoModelForSequenceClassification, name, locate(name)[0], device_map="meta")
    return skeleton(load_config(name), task_type=TASKS["classification"].task_type)  # a config alone


def without_weights(load: "partial[Any]", recipe: Recipe, dtype: Any, labels: list[str] | None = None) -> Any:
    """The model on the meta device; its parameters are marked where its checkpoint has them, if that is on this disk.

    Args:
        load: What would load it.
        recipe: The recipe.
        dtype: Of the base.
        labels: The classes of a classifier.

    Raises:
        ConfigError: there is no such model.
    """
    from flashbone.rwkv import read_config

    is_file = is_pth(recipe.model)
    asked = {name: load.keywords[name] for name in ("trust_remote_code", "revision") if name in load.keywords}
    config = read_config(Path(recipe.model).expanduser()) if is_file else load_config(recipe.model, **asked)
    # what is packed can only be read with its numbers
    if not is_file and not recipe.model.endswith(".gguf") and not hasattr(config, "quantization_config"):
        with suppress(ConfigError), _load_report(False), _no_bars():
            return load(device_map="meta", local_files_only=True)
    if TASKS[recipe.task].is_classifier:
        log.info("model %s: not compared with its weights; a run also trains whole what they lack", recipe.model)
    if labels is not None:
        config.num_labels = len(labels)
    return skeleton(config, dtype, TASKS[recipe.task].task_type)


def trust_of(args: Any) -> dict[str, Any]:
    """`trust_remote_code` for whatever loads, where the arguments ask for it; those of classifiers cannot."""
    return {"trust_remote_code": True} if getattr(args, "trust_remote_code", False) else {}


def load_config(name: str, **kwargs: Any) -> Any:
    """The model's configuration.

    Raises:
        ConfigError: there is no such model, or it has none.
    """
    from transformers import AutoConfig

    place, gguf = locate(name)
    return load(AutoConfig, name, place, **gguf, **kwargs)


def quantized_loading(recipe: Recipe, dtype: Any) -> dict[str, Any]:
    """Arguments for the loaders above so that the base is quantised as the recipe asks; none if it does not.

    Raises:
        ConfigError: it cannot be.
    """
    return quantized(recipe.model, quantization_of(recipe), dtype)


def quantized(name: str, quantization: Quantization | None, dtype: Any) -> dict[str, Any]:
    """The same for the model of this name."""
    if quantization is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantization: the package bitsandbytes is not installed; pip install flashbone[quant], or leave it out"
        )
    if name.endswith(".gguf"):
        raise ConfigError(f"quantization: {name} is dequantised on loading; use the model's own folder or hub id")
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type or "nf4",
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def locate(name: str) -> tuple[str, dict[str, str]]:
    """A model's name as from_pretrained takes it: a folder or hub id and, for GGUF, the file in the folder."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model {name}: no such GGUF file")
        gguf_head.check(path)
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or path.exists()
    if looks_local and not path.is_dir():
        wrong = "is a file" if path.exists() else "no such folder"
        raise ConfigError(f"model {name}: {wrong}; a folder, a hub id, a .gguf file or an RWKV model's .pth was wanted")
    if looks_local and not (path / "config.json").is_file():
        raise ConfigError(
            f"model {name}: the folder has no config.json, so it holds no model that transformers can load"
        )
    if looks_local:
        refuse_special(path)
        claims.check(path / "config.json", read_json(path / "config.json"))
    return (str(path) if looks_local else name), {}


def load(auto: Any, name: str, place: str, **kwargs: Any) -> Any:
    """`auto.from_pretrained(place)`, with errors that name the model as the user did.

    Raises:
        ConfigError: it fails.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return auto.from_pretrained(place, **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | LocalEntryNotFoundError):
            raise ConfigError(f"model {hub_problem(name, error.__cause__)}") from error
        raise ConfigError(f"model {name}: could not be loaded: {_reason(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise all kinds; the tokenizers library has none but this
        what = f"{type(error).__name__}: {_reason(error)}"
        raise ConfigError(f"model {name}: its files cannot be read ({what}); copy or download them again") from error


def _reason(error: Exception) -> str:
    """The first line of an error's text, and the whole text where that line only introduces a list."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines)[:300] if lines[0].endswith(":") else lines[0]


@contextmanager
def _no_bars() -> Iterator[None]:
    """None of transformers' progress bars: where nothing is read, they would say that weights are."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bar()


@contextmanager
def _load_report(is_wanted: bool) -> Iterator[None]:
    """transformers' report of weights that are new, if wanted."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_shown(record: logging.LogRecord) -> bool:
        return is_wanted or record.levelno >= logging.ERROR

    log.addFilter(is_shown)  # with a level of its own, this logger would also list what tensor parallelism left whole
    try:
        yield
    finally:
        log.removeFilter(is_shown)


def _plain(model: Any, name: str) -> Any:
    """A dequantised GGUF model as the plain model it is: transformers leaves a quantiser on it, and then neither
    trains nor saves it."""
    for holder, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.name_or_path = name  # goes into the adapter's file; the folder alone would not name the model
    return model
