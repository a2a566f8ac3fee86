"""The model that is evaluated, with its adapter, and what the run that trained the adapter says about it."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import peft as peft_files
from flashbone.files import reading
from flashbone.files.sources import hub_problem, read_json
from flashbone.train.models import load_causal_lm, load_classifier, load_tokenizer
from flashbone.train.recipe import is_pth


@dataclass(frozen=True)
class Run:
    """What `flashbone train` left beside an adapter; empty where it did not train it.

    Attributes:
        labels: the classes, in the order of the head's outputs.
        max_length: tokens of a row that were read.
    """

    labels: list[str] = field(default_factory=list)
    max_length: int | None = None


def run_of(adapter: Path | None) -> Run:
    """The run whose output folder an adapter, or a checkpoint with one, lies in.

    Raises:
        FormatError: there is a run, but its files are broken.
    """
    if adapter is None or not adapter.is_dir():
        return Run()
    folder = adapter.resolve().parent
    found = {name: read_json(folder / name) for name in ("summary.json", "recipe.json") if (folder / name).is_file()}
    training = found.get("recipe.json", {}).get("training") or {}
    return Run(list(found.get("summary.json", {}).get("labels") or []), training.get("max_length"))


def load_language_model(
    name: str, adapter: Path | None, dtype: Any, device: Any, *, merge: bool = False, vocabulary: str | None = None
) -> tuple[Any, Any]:
    """The model in eval mode on the device, with its adapter, and the tokenizer.

    Args:
        name: A folder, hub id, .gguf file, or an RWKV model's .pth file.
        adapter: Of any format that flashbone reads, or a folder of any of PEFT's methods.
        dtype: Of the base.
        device: Where it goes.
        merge: Put the adapter into the weights.
        vocabulary: Of an RWKV model, the file of its tokens.

    Raises:
        ConfigError: there is no such model or adapter, or the adapter is a classifier's.
        FormatError, ShapeError: the adapter cannot be read, or does not fit the model.
    """
    tokenizer = _tokenizer(name, adapter, vocabulary)
    model = load_causal_lm(name, dtype)
    if adapter is not None:
        model = attach(model, adapter, "CAUSAL_LM", merge)
    return model.to(device).eval(), tokenizer


def load_labelled_classifier(
    name: str, adapter: Path | None, dtype: Any, device: Any, *, labels: list[str] | None = None, merge: bool = False
) -> tuple[Any, Any, list[str]]:
    """The classifier in eval mode on the device, with its adapter; the tokenizer; and the classes in the head's order.

    Args:
        name: As for `load_language_model`.
        adapter: As there.
        dtype: Of the base.
        device: Where it goes.
        labels: The classes. None: as the adapter's run or the model's configuration says.
        merge: Put the adapter into the weights.

    Raises:
        ConfigError: there is no such model or adapter, the classes are not known, or nothing brings a trained head.
        FormatError, ShapeError: the adapter cannot be read, or does not fit the model.
    """
    if is_pth(name):
        raise ConfigError(f"model {name}: an RWKV model cannot classify; a classifier has no .pth format")
    tokenizer = _tokenizer(name, adapter, None)
    config = _config(name)
    has_head = any("SequenceClassification" in one for one in config.architectures or ())
    labels = labels or run_of(adapter).labels or (_labels_of(config) if has_head else [])
    if not labels:
        where = "the model's config.json has no names for them" if has_head else "the model has no classification head"
        beside = "" if adapter is None else f", and no summary.json of `flashbone train` lies beside {adapter}"
        raise ConfigError(f"labels of {name}: not known: {where}{beside}; give them in the head's order with --labels")
    if has_head and config.num_labels != len(labels) and adapter is None:
        raise ConfigError(
            f"labels of {name}: got {len(labels)} ({', '.join(labels)}), its head has {config.num_labels}"
        )
    if not has_head and adapter is None:
        raise ConfigError(
            f"model {name}: has no trained classification head; give the adapter that was trained with one"
        )
    with _without_report(not has_head):
        model = load_classifier(name, dtype, labels, tokenizer)
    if adapter is not None:
        model = attach(model, adapter, "SEQ_CLS", merge, needs_head=not has_head)
    return model.to(device).eval(), tokenizer, labels


def attach(model: Any, adapter: Path, task_type: str, merge: bool = False, needs_head: bool = False) -> Any:
    """The model with an adapter, active and unmerged unless `merge` is asked for.

    Args:
        model: A plain model.
        adapter: A folder of PEFT, or a file of another format of the family.
        task_type: PEFT's name of the task; an adapter of another one is refused.
        merge: Put the adapter into the weights, and return the plain model.
        needs_head: The adapter has to bring modules that were trained whole, as a classification head is.
    """
    import peft

    with _peft_folder(adapter) as folder, _misfits(adapter):
        config = peft.PeftConfig.from_pretrained(str(folder))
        own = getattr(config.task_type, "value", config.task_type)
        if own is not None and own != task_type:
            remedy = "use --classification" if own == "SEQ_CLS" else f"a {task_type} adapter was wanted"
            raise ConfigError(f"adapter {adapter}: was trained for the task {own}; {remedy}")
        if needs_head and not getattr(config, "modules_to_save", None):
            raise ConfigError(f"adapter {adapter}: brings no classification head, and the model has none")
        with same_compilers():
            adapted = peft.PeftModel.from_pretrained(model, str(folder), config=config)
    return adapted.merge_and_unload() if merge else adapted


@contextmanager
def same_compilers() -> Iterator[None]:
    """Restore CC and CXX: PEFT's BOFT leaves both at gcc where its CUDA extension cannot be built, and what Inductor
    compiles afterwards, here or in processes that inherit them, would not be linked to libstdc++."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _peft_folder(adapter: Path) -> Iterator[Path]:
    """Where PEFT finds the adapter: its own folder, or one that is made of another format for the time being."""
    if (adapter / peft_files.CONFIG).is_file():
        yield adapter
        return
    if not adapter.exists():
        raise ConfigError(f"adapter {adapter}: no such file or folder")
    with tempfile.TemporaryDirectory() as folder:
        peft_files.write(reading.read_adapter(adapter), Path(folder))
        yield Path(folder)


@contextmanager
def _misfits(adapter: Path) -> Iterator[None]:
    """One error for whatever PEFT says when an adapter does not fit; of missing tensors it would only warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
        try:
            yield
        except FlashboneError:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError, OSError, UserWarning) as error:
            text = " ".join(str(error).split())[:300]
            raise FormatError(f"adapter {adapter}: does not fit the model, or is broken: {text}") from error


@contextmanager
def _without_report(quiet: bool) -> Iterator[None]:
    """No word of transformers on a head that is new, where the adapter is about to bring a trained one."""
    log = logging.getLogger("transformers.modeling_utils")
    before = log.level
    log.setLevel(logging.ERROR if quiet else before)
    try:
        yield
    finally:
        log.setLevel(before)


def _tokenizer(name: str, adapter: Path | None, vocabulary: str | None) -> Any:
    """The adapter's own tokenizer where it has one, since training may have given it a chat template."""
    if vocabulary is None and adapter is not None and (adapter / "tokenizer_config.json").is_file():
        if is_pth(name):
            from flashbone.rwkv import RwkvTokenizer as Tokenizer
        else:
            from transformers import AutoTokenizer as Tokenizer
        try:
            tokenizer = Tokenizer.from_pretrained(adapter)
        except (OSError, ValueError) as error:
            raise FormatError(
                f"{adapter}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}"
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer
    return load_tokenizer(name, vocabulary)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    path = Path(name).expanduser()
    place, extra = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    try:
        return AutoConfig.from_pretrained(place, **extra)
    except OSError as error:
        if path.exists():
            raise ConfigError(f"model {name}: holds no model that transformers can load") from error
        raise ConfigError(f"model {hub_problem(name, error)}") from error
    except ValueError as error:
        raise ConfigError(f"model {name}: could not be loaded: {' '.join(str(error).split())[:200]}") from error


def _labels_of(config: Any) -> list[str]:
    """The names that a configuration has for its classes; none where they are transformers' place-holders."""
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    return [] if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
