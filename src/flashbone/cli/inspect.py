"""`flashbone inspect TARGET`: what an adapter on a model would cost, or what an adapter's file holds."""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from flashbone.cli import hub
from flashbone.cli.places import expand
from flashbone.cli.terminal import LIBRARIES, progress_bars
from flashbone.errors import ConfigError

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_FILE = "adapter.pth"  # in a folder that `flashbone convert --to rwkv-peft` made
TENSOR_FILES = (".pth", ".pt", ".bin", ".safetensors")

EPILOG = """\
TARGET is a model or an adapter:
  a model's folder, config.json or hub id   what an adapter on it would cost; its weights are neither needed nor read
  the .pth of an RWKV-7 or RWKV-6 model     the same, by the names and shapes in it
  an adapter's folder or hub id             what it holds: BONE, and in short MISS and LORA
  a .pth or .safetensors of RWKV-PEFT       the same
A folder or hub id with the configs of both is an adapter if it has an adapter's weights, adapter_model.safetensors or
adapter_model.bin, and else a model.

The adapter on a model is `bone` with r = 64 on all linear layers, unless --config or any field of BoneConfig says
otherwise; the setting that was published for a model of this size is named below the table:
  flashbone inspect HuggingFaceTB/SmolLM2-135M --adapter.variant bone --adapter.r 64
  flashbone inspect my-model --adapter.target_modules '[q_proj, v_proj]' --tokens 8192
  flashbone inspect my-model --config train.yaml
"""


def run(argv: list[str]) -> int:
    """Parse, inspect, print on stdout."""
    parser = make_parser()
    ours, fields = _separate(argv, parser)
    options = parser.parse_args(ours)
    expand(options, "target", "config")
    # Deprecations inside the libraries do not concern the user of this command.
    warnings.filterwarnings("ignore", category=FutureWarning, module=LIBRARIES)
    if _is_adapter(options.target):
        if fields or options.config:
            raise ConfigError(f"{options.target}: is an adapter; --config and --adapter.* are for models")
        from flashbone.inspect.adapter import inspect_adapter

        with progress_bars() as bar:
            task = bar.add_task("reading the adapter", total=None)
            report = inspect_adapter(
                hub.folder(options.target), lambda done, total: bar.update(task, completed=done, total=total)
            )
    else:
        report = _inspect_model(options, fields)
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        from flashbone.inspect.tables import print_report

        print_report(report)
    return 0


def _inspect_model(options: argparse.Namespace, fields: list[str]) -> Any:
    import torch
    import transformers
    from rich.console import Console

    from flashbone.inspect.model import inspect_model
    from flashbone.train.recipe import load_adapter_fields

    adapter = load_adapter_fields(options.config, fields)
    settings = {"tokens": options.tokens, "dtype": getattr(torch, options.dtype)}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # which kernels are installed does not matter here
    try:
        with Console(stderr=True).status(f"building {options.target} without weights"):
            return inspect_model(options.target, adapter, **settings)
    finally:
        transformers.logging.set_verbosity(verbosity)


def _is_adapter(target: str) -> bool:
    """Whether the target is an adapter; one that does not exist is refused as a model."""
    path = Path(target)
    if path.is_file():
        from flashbone.files import reading

        is_model = path.suffix == ".pth" and reading.rwkv_kind(path) == "model"
        return (path.suffix in TENSOR_FILES and not is_model) or path.name == ADAPTER_CONFIG

    def has(name: str) -> bool:
        return hub.has_file(target, name) if hub.looks_like_hub_id(target) else (path / name).is_file()

    if (path / ADAPTER_FILE).is_file() and not has(ADAPTER_CONFIG):
        return True
    return has(ADAPTER_CONFIG) and (not has(MODEL_CONFIG) or any(map(has, ADAPTER_WEIGHTS)))


def _separate(argv: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The command's arguments, and the adapter's fields with their values; they may be mixed."""
    ours, fields = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith(("--adapter.", "--adapter=")) and word != "--adapter":
            ours.append(word)
            continue
        fields.append(word)
        if "=" in word:
            continue
        value = next(words, None)
        if value is None or value.startswith("--"):
            parser.error(f"{word}: wanted a value, got {value or 'nothing'}")
        fields.append(value)
    return ours, fields


def _tokens(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive number")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone inspect",
        description="Say what training an adapter on a model would cost, or what an adapter holds.",
        usage="flashbone inspect TARGET [--config FILE] [--adapter.FIELD VALUE ...] [--tokens N] [--dtype D] [--json]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", help="a model or an adapter")
    parser.add_argument("--config", metavar="FILE", help="a recipe of `flashbone train`, whose adapter is taken")
    parser.add_argument(
        "--tokens", type=_tokens, default=2048, metavar="N", help="batch x sequence of a training step (2048)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the base (bfloat16)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
