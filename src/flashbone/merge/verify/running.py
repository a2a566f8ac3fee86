"""Loading a model in fp32, by transformers or from an RWKV model's `.pth` file, and running it on random tokens."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashbone.errors import FlashboneError, FormatError
from flashbone.files.base import open_base

LENGTHS = (24, 17)  # tokens of the rows that are run


def check_loadable(path: Path) -> None:
    """Whether there is a class for a model, as far as its config or its file's names tell.

    Raises:
        FormatError: there is none.
    """
    model = open_base(path)
    if model.is_pth:
        from flashbone.rwkv import read_config

        try:
            read_config(path)
        except FormatError as error:
            raise FormatError(f"{error}; it can be merged, but not verified") from error
    elif not model.config:
        raise FormatError(f"{path}: has no config.json, so that transformers cannot load it to verify the merge")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
def naming(path: Path) -> Iterator[None]:
    """Errors of the hosts as ours, in one line."""
    try:
        yield
    except FlashboneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{path}: cannot be verified, transformers or PEFT failed: {reason}") from error


def load(path: Path) -> tuple[Any, set[str]]:
    """The model in fp32, and the parameters that its files lack."""
    from transformers import AutoConfig

    with naming(path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if path.is_file():
            from flashbone.rwkv import from_pth

            return from_pth(path, torch.float32), set()  # which has found all of them there
        config = AutoConfig.from_pretrained(path)
        model, info = _class_for(config).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval(), set(info["missing_keys"])


def _class_for(config: Any) -> Any:
    """The class that a config names, of transformers or registered there; else the bare model's."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    named = (config.architectures or ["AutoModel"])[0]
    if hasattr(transformers, named):
        return getattr(transformers, named)
    registered = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return registered if getattr(registered, "__name__", None) == named else transformers.AutoModel


def rows_for(model: Any, path: Path) -> list[Tensor]:
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
        torch.randint(config.vocab_size, (1, min(length, positions // 2)), generator=generator) for length in LENGTHS
    ]
    if isinstance(getattr(config, "eos_token_id", None), int) and config.eos_token_id < config.vocab_size:
        for row in rows:
            row[0, -1] = config.eos_token_id
    return rows


def amplifies_rounding(path: Path) -> bool:
    """Whether it is a model of `flashbone.rwkv`, which runs in fp64, too."""
    return path.is_file() or str(open_base(path).config.get("model_type")) in ("rwkv_x070", "rwkv_x060")


def run(model: Any, rows: Sequence[Tensor], path: Path, dtype: torch.dtype) -> Tensor:
    """The logits of all rows, else the last hidden states, else everything that the model puts out; computed in `dtype`
    by a model whose weights are in fp32, and stay so."""
    if dtype != torch.float32:
        model.to(dtype)
    outputs = []
    for row in rows:
        with naming(path):
            inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = row
            output = model(**inputs, return_dict=True, use_cache=False)
        tensors = {name: t for name, t in output.items() if isinstance(t, Tensor) and t.is_floating_point()}
        first = next((name for name in ("logits", "last_hidden_state") if name in tensors), None)
        outputs += [tensors[first]] if first else list(tensors.values())
    if dtype != torch.float32:
        model.to(torch.float32)
    return torch.cat([output.double().flatten() for output in outputs])
