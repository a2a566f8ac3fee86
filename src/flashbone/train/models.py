"""Loading the model and its tokenizer: from a folder, a hub id, a .gguf file or an RWKV model's .pth file, ready to be
adapted and saved again."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError
from flashbone.files.sources import hub_problem
from flashbone.train.recipe import Recipe, is_pth, quantization_of


def load_tokenizer(name: str, vocabulary: str | None = None, **kwargs: Any) -> Any:
    """The tokenizer beside the model, with a padding token; of a `.pth` file RWKV's, with the vocabulary in a file.

    Raises:
        ConfigError: there is no such model, or it has no tokenizer.
    """
    if is_pth(name):
        from flashbone.rwkv import RwkvTokenizer

        return RwkvTokenizer(vocabulary and Path(vocabulary).expanduser())
    from transformers import AutoTokenizer

    place, extra = _locate(name)
    tokenizer = _load(AutoTokenizer, name, place, **extra, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"model {name}: its tokenizer has no padding, end or unknown token; add one and save it")
    return tokenizer


def load_causal_lm(name: str, dtype: Any, **kwargs: Any) -> Any:
    """The language model in `dtype`."""
    if is_pth(name):
        from flashbone.rwkv import from_pth

        return from_pth(Path(name).expanduser(), **{"dtype": dtype, **kwargs})
    from transformers import AutoModelForCausalLM

    place, extra = _locate(name)
    model = _load(AutoModelForCausalLM, name, place, **{"dtype": dtype, **extra, **kwargs})
    return _plain(model, name) if extra else model


def load_classifier(name: str, dtype: Any, labels: list[str], tokenizer: Any, **kwargs: Any) -> Any:
    """The model with a classification head for `labels`; the head is new where the checkpoint has none that fits."""
    from transformers import AutoModelForSequenceClassification

    place, extra = _locate(name)
    head = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "ignore_mismatched_sizes": True,
    }
    model = _load(AutoModelForSequenceClassification, name, place, dtype=dtype, **head, **extra, **kwargs)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify at the last token before the padding
    return _plain(model, name) if extra else model


def quantized_loading(recipe: Recipe, dtype: Any) -> dict[str, Any]:
    """What the loaders above are to be given so that the base is quantised as the recipe says; nothing if it does not.

    Raises:
        ConfigError: it cannot be.
    """
    quantization = quantization_of(recipe)
    if quantization is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantization: the package bitsandbytes is not installed; pip install flashbone[quant], or leave it out"
        )
    if recipe.model.endswith(".gguf"):
        raise ConfigError(
            f"quantization: {recipe.model} is dequantised on loading; use the model's own folder or hub id"
        )
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


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained wants to hear: a folder and, for GGUF, the file in it."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model {name}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or path.exists()
    if looks_local and not path.is_dir():
        wrong = "is a file" if path.exists() else "no such folder"
        raise ConfigError(f"model {name}: {wrong}; a folder, a hub id, a .gguf file or an RWKV model's .pth was wanted")
    if looks_local and not (path / "config.json").is_file():
        raise ConfigError(
            f"model {name}: the folder has no config.json, so it holds no model that transformers can load"
        )
    return (str(path) if looks_local else name), {}


def _load(auto: Any, name: str, place: str, **kwargs: Any) -> Any:
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return auto.from_pretrained(place, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | LocalEntryNotFoundError):
            raise ConfigError(f"model {hub_problem(name, error.__cause__)}") from error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model {name}: could not be loaded: {reason.strip()}") from error


def _plain(model: Any, name: str) -> Any:
    """A dequantised GGUF model as the plain model it is: transformers leaves a quantiser on it, and then neither
    trains nor saves it."""
    for holder, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.name_or_path = name  # goes into the adapter's file; the folder alone would not say which model it was
    return model
