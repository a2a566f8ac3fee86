"""A model that answers, with any of several adapters or without: what `chat` and `generate` share."""

import contextlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from flashbone.errors import ConfigError
from flashbone.evaluate.bases import base_of, is_adapter
from flashbone.evaluate.loading import load_language_model
from flashbone.evaluate.request import DTYPES, device_and_dtype
from flashbone.train.decoding import Decoding, continuations, text_of
from flashbone.train.recipe import Quantization
from flashbone.train.templates import give_template
from flashbone.train.tokenizers import stop_tokens

# `generate`'s name for its cache: transformers 5.24 renamed it, and warns about the older one.
CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
BASE = "__base__"  # PEFT's name for no adapter
RESERVED = ("off", "base")  # what commands call no adapter
BLANK_LINE = "\n\n"  # ends a round in the format of RWKV's models


@dataclass(frozen=True)
class Model:
    """What is asked.

    Attributes:
        name: folder, hub id, .gguf file, or an RWKV model's .pth file; or an adapter's folder that names its base.
        adapters: folders or files, or NAME=PATH.
        dtype: "fp32", "bf16" or "fp16"; None: fp32 on a CPU, else bf16.
        device: as torch names it; None: a GPU where there is one.
        bits: 4 or 8 of each weight of the base; None for those of dtype.
        vocabulary: file of an RWKV model's tokens.
        chat_template: file of a template, in place of the model's own.
    """

    name: str
    adapters: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    bits: int | None = None
    vocabulary: str | None = None
    chat_template: Path | None = None

    def resolved(self) -> tuple[str, dict[str, Path]]:
        """The base, and the adapters by their names.

        Raises:
            ConfigError: there is no such adapter or base, or two adapters were given one name.
        """
        given = (self.name, *self.adapters) if is_adapter(self.name) else self.adapters
        return base_of(self.name) if is_adapter(self.name) else self.name, named(given)


def named(adapters: Sequence[str]) -> dict[str, Path]:
    """Adapters by their names: as given in NAME=PATH, else the folder's, or of runs/first/adapter the run's.

    Raises:
        ConfigError: there is no such file or folder, or a name is taken.
    """
    found: dict[str, Path] = {}
    for adapter in adapters:
        match = None if Path(adapter).exists() else re.fullmatch(r"([\w.-]+)=(.+)", adapter)
        path = Path(match[2] if match else adapter).expanduser()
        if not path.exists():
            raise ConfigError(f"adapter {path}: no such file or folder")
        if match and (match[1] in found or match[1] in RESERVED):
            raise ConfigError(f"adapter {adapter}: the name {match[1]} is taken; choose another")
        whole = path.resolve()
        name = (
            match[1]
            if match
            else whole.parent.name
            if whole.name == "adapter"
            else whole.stem
            if whole.is_file()
            else whole.name
        )
        number, unique = 1, name
        while unique in found or unique in RESERVED:
            number += 1
            unique = f"{name}-{number}"
        found[unique] = path
    return found


class Writing(TextStreamer):
    """Hands an answer's words on as they come; `ids` are its tokens so far."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], stops: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self._write, self._stops = write, stops

    def put(self, value: torch.Tensor) -> None:
        is_prompt = self.next_tokens_are_prompt
        if not is_prompt:
            self.ids += value.flatten().tolist()
        if is_prompt or self.ids[-1] not in self._stops:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


@dataclass
class Speaker:
    """A loaded model.

    Attributes:
        keys: PEFT's names of adapters, by ours.
        stops: the tokens that end an answer.
    """

    model: Any
    tokenizer: Any
    base: str
    keys: dict[str, str] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)

    @property
    def is_rwkv(self) -> bool:
        """Whether its memory is a state of one size."""
        return str(getattr(self.model.config, "model_type", "")).startswith("rwkv_x0")

    def using(self, adapter: str | None) -> AbstractContextManager[Any]:
        """The model with one adapter, or with none."""
        if not self.keys:
            return contextlib.nullcontext()
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(self.keys[adapter])
        return contextlib.nullcontext()

    @property
    def mixes(self) -> bool:
        """Whether rows with different adapters can be in one batch."""
        configs = list(self.model.peft_config.values()) if self.keys else []
        kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs}
        whole = ("modules_to_save", "parameters_to_save", "use_dora", "trainable_token_indices")
        plain = all(
            getattr(config, "bias", "none") == "none" and not any(getattr(config, name, None) for name in whole)
            for config in configs
        )
        return plain and kinds <= {"BONE", "LORA"}

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[list[int]], adapters: Sequence[str | None], decoding: Decoding
    ) -> list[list[int]]:
        """The tokens of the answers to a batch of prompts, each with its adapter."""
        kinds = list(dict.fromkeys(adapters))
        if len(kinds) > 1 and self.mixes:
            keys = [BASE if name is None else self.keys[name] for name in adapters]
            return continuations(self.model, self.tokenizer, prompts, self.stops, decoding, keys)
        answers: dict[int, list[int]] = {}
        for kind in kinds:
            rows = [row for row, name in enumerate(adapters) if name == kind]
            with self.using(kind):
                asked = [prompts[row] for row in rows]
                written = continuations(self.model, self.tokenizer, asked, self.stops, decoding)
            answers |= dict(zip(rows, written, strict=True))
        return [answers[row] for row in range(len(prompts))]

    @torch.no_grad()
    def stream(self, ids: list[int], adapter: str | None, decoding: Decoding, writing: Writing, past: Any) -> Any:
        """Answer one prompt word by word; returns the memory of all tokens but the last.

        Args:
            ids: The prompt; `past` has seen its beginning.
            adapter: Its name; None for the base alone.
            decoding: How tokens are chosen.
            writing: Gets the words; on Ctrl-C, too, it holds what was written.
            past: What an earlier call returned, or None.
        """
        tokens = torch.tensor([ids], device=next(self.model.parameters()).device)
        pad = self.tokenizer.pad_token_id
        with self.using(adapter):
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=writing,
                return_dict_in_generate=True,
                eos_token_id=self.stops or None,
                pad_token_id=pad if pad is not None else (self.stops or [0])[0],
                **{CACHE: past},
                **decoding.arguments(),
            )
        return getattr(output, CACHE)

    def text(self, ids: list[int]) -> str:
        """The text of an answer."""
        return text_of(self.tokenizer, ids, self.stops)


def load_speaker(asked: Model) -> Speaker:
    """The model in eval mode, with its adapters.

    Raises:
        ConfigError: there is no such model, adapter or base; or what was asked does not go together.
        FormatError, ShapeError: an adapter cannot be read, or does not fit the model.
    """
    base, adapters = asked.resolved()
    device, dtype = device_and_dtype(asked.device, asked.dtype)
    template = asked.chat_template
    if template is not None and not template.is_file():
        raise ConfigError(f"chat_template {template}: no such file")
    quantization = None if asked.bits is None else Quantization(asked.bits)  # pyright: ignore[reportArgumentType]
    keys = {name: f"adapter{number}" for number, name in enumerate(adapters)}
    model, tokenizer = load_language_model(
        base,
        {keys[name]: path for name, path in adapters.items()},
        DTYPES[dtype],
        device,
        vocabulary=asked.vocabulary,
        quantization=quantization,
    )
    if template is not None:
        give_template(tokenizer, template)
    speaker = Speaker(model, tokenizer, base, keys, stop_tokens(model, tokenizer))
    if speaker.is_rwkv:
        blank = tokenizer(BLANK_LINE, add_special_tokens=False)["input_ids"]
        speaker.stops += [token for token in blank if len(blank) == 1 and token not in speaker.stops]
    return speaker
