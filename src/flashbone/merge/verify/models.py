"""Load models in fp32, by transformers or from an RWKV model's `.pth` file, attach adapters unmerged, and run them."""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from flashbone.errors import FlashboneError, FormatError
from flashbone.files import names, peft
from flashbone.files.adapter import Adapter
from flashbone.files.base import open_base
from flashbone.files.beside import GENERATION, TEMPLATE, TOKENIZER_CONFIG, Beside
from flashbone.files.placing import shaped
from flashbone.files.sources import read_json
from flashbone.merge.plan import WeightedAdapter
from flashbone.rwkv import from_pth, read_config

LENGTHS = (24, 17)  # tokens of the rows that are run
QUESTION, ANSWER = "What is two plus two?", 8  # of the chat template, and how many tokens of the answer are generated

_OF_NO_EFFECT = ("transformers_version", "_from_model_config")  # in generation_config.json


def check_loadable(path: Path) -> None:
    """Check that a model has a class, as far as its config or the names in its file tell.

    Raises:
        FormatError: it has none.
    """
    model = open_base(path)
    if model.is_pth:
        try:
            read_config(path)
        except FormatError as error:
            raise FormatError(f"{error}; it can be merged, but not verified") from error
    elif not model.config:
        raise FormatError(f"{path}: has no config.json, so transformers cannot load it to verify the merge")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and progress bars of transformers."""
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
    """Turn errors of transformers and PEFT into ours, in one line that names the path."""
    try:
        yield
    except FlashboneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{path}: cannot be verified, transformers or PEFT failed: {reason}") from error


def load(path: Path) -> tuple[PreTrainedModel, set[str]]:
    """The model in fp32, and the parameters that its files lack; these get the same random numbers each time."""
    with naming(path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if path.is_file():
            return from_pth(path, torch.float32), set()  # it refuses files that lack any
        config = transformers.AutoConfig.from_pretrained(path)
        model, info = _class_for(config).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval(), set(info["missing_keys"])


def _class_for(config: PretrainedConfig) -> Any:
    """The class that a config names, of transformers or registered there; else the class of the bare model."""
    name = (config.architectures or ["AutoModel"])[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    registered = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return registered if getattr(registered, "__name__", None) == name else transformers.AutoModel


def attach(model: Any, adapters: Sequence[WeightedAdapter]) -> PeftModel:
    """Attach adapters to a model in place, all of them active and unmerged; the PeftModel."""
    attached: Any = None
    for n, (adapter, path, weight) in enumerate(adapters):
        rows = [len(v) for name, v in adapter.replacements.items() if names.is_embedding(name, names.INPUT_EMBEDDINGS)]
        if rows and rows[0] > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(rows[0], mean_resizing=False)
        with naming(path), tempfile.TemporaryDirectory() as folder:
            peft.write(_with_weighted_values(adapter, weight, model), Path(folder))
            if attached is None:
                config = PeftConfig.from_pretrained(folder)
                config.task_type = None  # a plain PeftModel, whatever the model can do
                attached = PeftModel.from_pretrained(_root(model, adapter), folder, f"adapter{n}", config=config)
            else:
                attached.load_adapter(folder, f"adapter{n}")
        attached.base_model.set_scale(f"adapter{n}", weight)
    attached.base_model.set_adapter(list(attached.peft_config))
    attached.base_model.cache_in_inference(False)
    return attached.eval()


def _with_weighted_values(adapter: Adapter, weight: float, model: nn.Module) -> Adapter:
    """The adapter with the values that a merge gives the base's tensors, since PEFT scales blocks only; in the shapes
    of the model's parameters, from which those in RWKV's files differ."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    located, _ = names.locate(adapter.replacements, parameters)  # loading reports the others
    values = dict(adapter.replacements)
    for name, parameter in located.items():
        stored = parameters[parameter].detach()
        value = shaped(values[name], tuple(stored.shape))
        is_moved = weight != 1 and value.shape == stored.shape
        values[name] = stored + weight * (value.to(stored.dtype) - stored) if is_moved else value
    return replace(adapter, replacements=values)


def _root(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The module from which the adapter's names lead to its layers: the model, a part of it (`model.`), or a module
    around it (`bert.`)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    located, lost = names.locate([adapter.parameter(name) for name in adapter.blocks], parameters)
    shifted = [(wanted, name) for wanted, name in located.items() if wanted != name]
    if lost or not shifted:
        return model  # loading reports what does not fit
    wanted, name = shifted[0]
    if len(name) > len(wanted):
        return model.get_submodule(name.removesuffix(f".{wanted}"))
    around = nn.Module()
    around.add_module(wanted.removesuffix(f".{name}"), model)
    return around


def rows_for(model: PreTrainedModel, path: Path) -> list[Tensor]:
    """Rows of random tokens, of several lengths; each ends with the model's end token, if it has one.

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


class Answer(NamedTuple):
    """A prompt, the beginning of the model's answer, and the settings that it is generated with."""

    prompt: list[int]
    tokens: list[int]
    settings: dict[str, Any]


def answer(model: Any, path: Path, brought: Beside) -> Answer:
    """The first tokens that a language model generates in the chat template, up to where it stops; empty without one.

    Args:
        model: The model.
        path: Its folder, which has what `brought` lacks.
        brought: Tokenizer, template and generation settings of its adapters.
    """
    source = brought.files.get(TOKENIZER_CONFIG, path / TOKENIZER_CONFIG).parent
    if path.is_file() or not (source / TOKENIZER_CONFIG).is_file() or model.get_output_embeddings() is None:
        return Answer([], [], {})
    with naming(source):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(source))
        if TEMPLATE in brought.files:
            tokenizer.chat_template = brought.files[TEMPLATE].read_text(encoding="utf-8")
        if tokenizer.chat_template is None or model.config.is_encoder_decoder:
            return Answer([], [], {})
        turns = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        file = brought.files.get(GENERATION, path / GENERATION)
        settings = read_json(file) if file.is_file() else {"eos_token_id": model.config.eos_token_id}
        settings = {name: value for name, value in settings.items() if name not in _OF_NO_EFFECT}
        settings["end of the tokenizer"] = tokenizer.eos_token_id
        named = settings.get("eos_token_id")
        stops = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        tokens: list[int] = []
        while len(tokens) < ANSWER and stops.isdisjoint(tokens[-1:]):
            ids = torch.tensor([[*prompt, *tokens]])
            tokens.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    return Answer(prompt, tokens, settings)


def amplifies_rounding(path: Path) -> bool:
    """Whether it is an RWKV model of `flashbone.rwkv`, which can run in fp64, too."""
    return path.is_file() or str(open_base(path).config.get("model_type")) in ("rwkv_x070", "rwkv_x060")


def run(model: Any, rows: Sequence[Tensor], path: Path, dtype: torch.dtype) -> Tensor:
    """The logits of all rows, else the last hidden states, else all outputs of the model; computed in `dtype`, while
    the model's weights stay in fp32."""
    if dtype != torch.float32:
        model.to(dtype)
    outputs = []
    for row in rows:
        with naming(path):
            inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = row
            output = model(**inputs, return_dict=True, use_cache=False)
        floats = {name: t for name, t in output.items() if isinstance(t, Tensor) and t.is_floating_point()}
        first = next((name for name in ("logits", "last_hidden_state") if name in floats), None)
        outputs += [floats[first]] if first else list(floats.values())
    if dtype != torch.float32:
        model.to(torch.float32)
    return torch.cat([output.double().flatten() for output in outputs])
