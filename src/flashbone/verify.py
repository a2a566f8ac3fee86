"""Whether a merged model does what its base and adapters do: both are loaded, and their outputs compared.

A merge into 16-bit files rounds, and what that does to the outputs depends on the model. It is measured: the unmerged
model is merged in memory in fp32, which must leave its outputs, then rounded as the files are, which the files must
equal. So the limit is that of fp32 arithmetic whatever the files hold, and no wrong merge hides behind the rounding.
"""

import contextlib
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashbone.checkpoint import Adapter, names, peft, reading
from flashbone.checkpoint.base import BaseModel, open_base
from flashbone.checkpoint.tensors import FLOATS
from flashbone.errors import ConfigError, FlashboneError, FormatError

# RMS of the outputs' error over their RMS. Right merges of SmolLM2-135M leave 1e-6 to 2e-6 in fp32.
LIMIT = 3e-5
_LENGTHS = (24, 17)  # tokens of the rows that are run


@dataclass(frozen=True)
class Verification:
    """What the comparison found. Errors are RMS errors of the outputs over the RMS of the unmerged model's.

    Attributes:
        tokens: that were run.
        dtype: of most numbers in the merged files.
        relative_error: of the merged model, to the unmerged one.
        rounding: what rounding to the files' dtypes explains of it.
        unexplained: what it does not.
        limit: that `unexplained` may reach.
        ok: whether it does not exceed it.
    """

    tokens: int
    dtype: str
    relative_error: float
    rounding: float
    unexplained: float
    limit: float
    ok: bool


class _Held(NamedTuple):
    """An adapter, where it came from, and how much of it went in."""

    path: Path
    adapter: Adapter
    weight: float


def check_verifiable(base: str | Path, adapters: Sequence[str | Path], weights: Sequence[float] | None) -> None:
    """Refuse what `compare_logits` could never compare, before a merge spends its time on it.

    Raises:
        ConfigError, FormatError: as `compare_logits` does, but for what only loading the model can tell.
    """
    _check_folder(Path(base))
    _read(adapters, weights)


def compare_logits(
    base: str | Path, adapters: Sequence[str | Path], weights: Sequence[float] | None, merged: str | Path
) -> Verification:
    """Compare a merged model with its base and adapters, unmerged, on random tokens, on the CPU in fp32.

    One of the two models is in memory at a time.

    Args:
        base: The base model's folder.
        adapters: Adapters of the family, in any format that a merge takes; one may come twice.
        weights: How much of each went in; None: 1.
        merged: The merged model's folder.

    Raises:
        ConfigError: the arguments contradict each other, or more than one adapter brings values of its own.
        FormatError: what transformers cannot load or run, or adapters that do not fit the class that it makes.
    """
    base, merged = Path(base), Path(merged)
    held = _read(adapters, weights)
    for path in (base, merged):
        _check_folder(path)
    files = open_base(merged)
    with _quiet(), torch.no_grad():
        model, missing = _load(base)
        rows = _rows(model, base)
        attached = _attach(model, held)
        unmerged = _run(model, rows, base)
        attached.merge_and_unload()
        in_memory = _run(model, rows, base)
        _round(model, files)
        rounded = _run(model, rows, base)
        del model, attached
        model, missing_now = _load(merged)
        if missing_now - missing:
            raise FormatError(f"{merged}: it lacks {', '.join(sorted(missing_now - missing))}, which the base has")
        got = _run(model, rows, merged)
    unexplained = max(_error(in_memory, unmerged, unmerged), _error(got, rounded, unmerged))
    return Verification(
        tokens=sum(row.shape[1] for row in rows),
        dtype=str(_usual_dtype(files)).removeprefix("torch."),
        relative_error=_error(got, unmerged, unmerged),
        rounding=_error(rounded, in_memory, unmerged),
        unexplained=unexplained,
        limit=LIMIT,
        ok=unexplained <= LIMIT,
    )


def _check_folder(path: Path) -> None:
    model = open_base(path)
    if model.is_pth:
        raise FormatError(f"{path}: RWKV models cannot be verified, transformers has no class for them")
    if not model.config:
        raise FormatError(f"{path}: has no config.json, so that transformers cannot load it to verify the merge")


def _read(adapters: Sequence[str | Path], weights: Sequence[float] | None) -> list[_Held]:
    """The adapters, once it is known that PEFT can hold them side by side."""
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not adapters:
        raise ConfigError(f"weights: got {len(weights)} for {len(adapters)} adapters, wanted one for each")
    paths = [Path(adapter) for adapter in adapters]
    held = [_Held(path, reading.read_adapter(path), weight) for path, weight in zip(paths, weights, strict=True)]
    replacing = dict.fromkeys(str(one.path) for one in held if one.adapter.replacements)
    if len(held) > 1 and replacing:
        raise ConfigError(
            f"{', '.join(replacing)}: holds values that take the place of the base's (biases, modules to save), which"
            " PEFT cannot load beside another adapter; such a merge cannot be verified"
        )
    return held


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor progress bars of the hosts, and the same random numbers for what a checkpoint lacks."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the hosts as ours, in one line."""
    try:
        yield
    except FlashboneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{path}: cannot be verified, transformers or PEFT failed: {reason}") from error


def _load(folder: Path) -> tuple[Any, set[str]]:
    """The model in fp32, and the parameters that the folder lacks."""
    import transformers

    with _naming(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(folder)
        named = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, named, transformers.AutoModel)
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), set(info["missing_keys"])


def _attach(model: nn.Module, held: Sequence[_Held]) -> Any:
    """Put the adapters on the model in place, all of them active and unmerged."""
    from peft import PeftConfig, PeftModel

    attached: Any = None
    for n, (path, adapter, weight) in enumerate(held):
        name = f"adapter{n}"
        with _naming(path), tempfile.TemporaryDirectory() as folder:
            peft.write(_moved(adapter, weight, model), Path(folder))
            if attached is None:
                config = PeftConfig.from_pretrained(folder)
                config.task_type = None  # a plain PeftModel, whatever the model can do
                attached = PeftModel.from_pretrained(_root(model, adapter), folder, name, config=config)
            else:
                attached.load_adapter(folder, name)
        attached.base_model.set_scale(name, weight)
    attached.base_model.set_adapter(list(attached.peft_config))
    attached.base_model.cache_in_inference(False)
    return attached.eval()


def _moved(adapter: Adapter, weight: float, model: nn.Module) -> Adapter:
    """The adapter whose values are those that a merge moves the base's to: the scale of PEFT leaves values alone."""
    if weight == 1:
        return adapter
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, _ = names.locate(adapter.replacements, parameters)  # loading names the others
    moved = dict(adapter.replacements)
    for name, value in adapter.replacements.items():
        if name in found and parameters[found[name]].shape == value.shape:
            stored = parameters[found[name]].detach()
            moved[name] = stored + weight * (value.to(stored.dtype) - stored)
    return replace(adapter, replacements=moved)


def _root(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Where the adapter's names begin: the model, what is in it (`model.`), or a box around it (`bert.`)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, lost = names.locate([adapter.parameter(name) for name in adapter.blocks], parameters)
    shifted = [(wanted, name) for wanted, name in found.items() if wanted != name]
    if lost or not shifted:
        return model  # loading names what does not fit
    wanted, name = shifted[0]
    if len(name) > len(wanted):
        return model.get_submodule(name.removesuffix(f".{wanted}"))
    box = nn.Module()
    box.add_module(wanted.removesuffix(f".{name}"), model)
    return box


def _rows(model: Any, path: Path) -> list[Tensor]:
    """Rows of random tokens, of several lengths; the last token ends them, where the model knows one that does.

    Raises:
        FormatError: the model takes no tokens, or not alone.
    """
    config = model.config.get_text_config()
    if model.main_input_name != "input_ids" or not hasattr(config, "vocab_size"):
        raise FormatError(f"{path}: cannot be verified, the model takes {model.main_input_name}, wanted token ids")
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1024
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(config.vocab_size, (1, min(length, positions // 2)), generator=generator) for length in _LENGTHS
    ]
    if isinstance(getattr(config, "eos_token_id", None), int) and config.eos_token_id < config.vocab_size:
        for row in rows:
            row[0, -1] = config.eos_token_id
    return rows


def _run(model: Any, rows: Sequence[Tensor], path: Path) -> Tensor:
    """The logits of all rows, else the last hidden states, else everything that the model puts out."""
    outputs = []
    for row in rows:
        with _naming(path):
            inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = row
            output = model(**inputs, return_dict=True, use_cache=False)
        tensors = {name: t for name, t in output.items() if isinstance(t, Tensor) and t.is_floating_point()}
        first = next((name for name in ("logits", "last_hidden_state") if name in tensors), None)
        outputs += [tensors[first]] if first else list(tensors.values())
    return torch.cat([output.double().flatten() for output in outputs])


def _round(model: nn.Module, files: BaseModel) -> None:
    """Round every parameter to the dtype that the files keep it in."""
    parameters = dict(model.named_parameters())
    found, _ = names.locate(parameters, files.entries)
    usual = _usual_dtype(files)
    for name, parameter in parameters.items():
        dtype = FLOATS.get(files.entries[found[name]].dtype) if name in found else usual
        if dtype is not None:
            parameter.copy_(parameter.to(dtype))


def _usual_dtype(files: BaseModel) -> torch.dtype:
    """That most numbers of the files have."""
    count: Counter[torch.dtype] = Counter()
    for entry in files.entries.values():
        if entry.dtype in FLOATS:
            count[FLOATS[entry.dtype]] += entry.end - entry.start
    return count.most_common(1)[0][0] if count else torch.float32


def _error(got: Tensor, want: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite where an output is not finite, or there are others."""
    if got.shape != want.shape:
        return math.inf
    error = float((got - want).square().mean().sqrt() / reference.square().mean().sqrt())
    return error if math.isfinite(error) else math.inf
