"""What `flashbone eval` is asked for, and what goes together."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flashbone.errors import ConfigError
from flashbone.evaluate.bases import base_of, is_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What is to be measured; fields are the options of `flashbone eval`.

    Attributes:
        model: folder, hub id, .gguf file, or an RWKV model's .pth file; or an adapter's folder that names its base.
        adapter: a folder or file.
        merge: put the adapter into the weights first.
        tasks: of lm-evaluation-harness.
        include_path: folder with task files.
        num_fewshot: solved examples before each question of a task.
        apply_chat_template: put the questions of tasks into the chat template.
        exact_match: file of questions and answers.
        prompt: template of a question, or "alpaca".
        chat_template: put the questions of `exact_match` into the chat template, if the tokenizer has one.
        max_new_tokens: longest answer.
        classification: file of texts and labels.
        labels: classes in the order of the head's outputs.
        perplexity: file of texts.
        columns: our name of a column to the file's.
        limit: rows of each file or task.
        batch_size: rows at once.
        max_length: tokens of a row, for classification and perplexity.
        dtype: "fp32", "bf16" or "fp16"; None: fp32 on a CPU, else bf16.
        device: as torch names it; None: a GPU where there is one.
        vocabulary: file of an RWKV model's tokens.
        output: folder for results.json and answers.jsonl.
    """

    model: str
    adapter: Path | None = None
    merge: bool = False
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    exact_match: Path | None = None
    prompt: str | None = None
    chat_template: bool = True
    max_new_tokens: int = 512
    classification: Path | None = None
    labels: tuple[str, ...] = ()
    perplexity: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    dtype: str | None = None
    device: str | None = None
    vocabulary: str | None = None
    output: Path | None = None


def settled(request: Request) -> Request:
    """The request with device and dtype decided, once its fields go together.

    Raises:
        ConfigError: they do not.
    """
    wanted = [request.tasks, request.exact_match, request.classification, request.perplexity]
    if not any(wanted):
        raise ConfigError("nothing to measure: give tasks, exact_match, classification or perplexity")
    if request.classification and any((request.tasks, request.exact_match, request.perplexity)):
        raise ConfigError("classification needs a classifier, the other measures a language model; run it by itself")
    if is_adapter(request.model):
        if request.adapter is not None:
            raise ConfigError(
                f"model {request.model}: is an adapter, and --adapter names another; give the base as MODEL"
            )
        request = replace(request, model=base_of(request.model), adapter=Path(request.model).expanduser())
    if request.merge and request.adapter is None:
        raise ConfigError("merge: there is no adapter to merge; give one, or leave it out")
    for name in ("batch_size", "max_new_tokens", "limit", "max_length"):
        value = getattr(request, name)
        if value is not None and value < (2 if name == "max_length" else 1):
            raise ConfigError(f"{name}: got {value}, wanted {2 if name == 'max_length' else 1} or more")
    if request.num_fewshot is not None and request.num_fewshot < 0:
        raise ConfigError(f"num_fewshot: got {request.num_fewshot}, wanted 0 or more")
    if request.prompt not in (None, "alpaca") and "{question}" not in (request.prompt or ""):
        raise ConfigError(f"prompt: got {request.prompt!r}, wanted 'alpaca' or a text with {{question}} in it")
    device, dtype = device_and_dtype(request.device, request.dtype)
    return replace(request, device=device, dtype=dtype)


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Both as they are asked for, or a GPU where there is one; and bf16 there, fp32 on a CPU.

    Raises:
        ConfigError: there is no such device or dtype.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device: got {device!r}: {str(error).splitlines()[0]}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: got {device!r}, but torch finds no GPU; use cpu")
    dtype = dtype or ("fp32" if place.type == "cpu" else "bf16")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, wanted {', '.join(DTYPES)}")
    return str(place), dtype
