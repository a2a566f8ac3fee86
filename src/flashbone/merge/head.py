"""The head of a classifier or a reward model that an adapter brings, where the base is a plain language model."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashbone.files import names, tensors
from flashbone.files.base import BaseModel
from flashbone.files.sources import read_json
from flashbone.merge.plan import WeightedAdapter


@contextmanager
def with_heads(model: BaseModel, adapters: Sequence[WeightedAdapter]) -> Iterator[BaseModel]:
    """The base; where an adapter of a classifier brings a new head, with one of zeros, and with its configuration."""
    heads = {name: value for weighted in adapters for name, value in _new_head(model, weighted).items()}
    if not heads:
        yield model
        return
    dtype = next((tensors.FLOATS[e.dtype] for e in model.entries.values() if e.dtype in tensors.FLOATS), torch.float32)
    with TemporaryDirectory() as place:
        path = Path(place) / "head.safetensors"
        save_file({name: torch.zeros(value.shape, dtype=dtype) for name, value in heads.items()}, path)
        file = tensors.scan(path)
        entries = {**model.entries, **{entry.name: entry for entry in file.entries}}
        config = _of_classifier(model.config, min(len(value) for value in heads.values()))
        if not isinstance(config.get("pad_token_id"), int) and (pad := _padding(adapters[0].path)) is not None:
            config["pad_token_id"] = pad
        yield dataclasses.replace(model, files=(*model.files, file), entries=entries, config=config)


def _new_head(model: BaseModel, weighted: WeightedAdapter) -> dict[str, Tensor]:
    """What an adapter of a classifier holds whole, and the base does not have."""
    adapter = weighted.adapter
    if adapter.config.get("task_type") != "SEQ_CLS" or model.is_pth:
        return {}
    _, lost = names.locate([*map(adapter.parameter, adapter.blocks), *adapter.replacements], model.entries)
    return {name: value for name, value in adapter.replacements.items() if name in lost}


def _of_classifier(config: dict[str, Any], labels: int) -> dict[str, Any]:
    classes = [re.sub(r"(LMHeadModel|For\w+|Model)$", "", name) for name in config.get("architectures") or ()]
    changed = {**config, "architectures": [f"{name}ForSequenceClassification" for name in classes]}
    if len(config.get("id2label") or ()) != labels:
        changed["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
        changed["label2id"] = {name: int(number) for number, name in changed["id2label"].items()}
    return changed


def _padding(adapter: Path) -> int | None:
    """The id of the padding token, by the tokenizer beside an adapter; a classifier looks for the last other token."""
    if not all((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    token = read_json(adapter / "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    added = read_json(adapter / "tokenizer.json").get("added_tokens") or ()
    return next((entry["id"] for entry in added if entry.get("content") == token), None)
