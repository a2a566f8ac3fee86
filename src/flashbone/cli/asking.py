"""What `chat` and `generate` share on the command line: the model with its adapters, and how tokens are chosen."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.cli import hub
from flashbone.cli.places import expand

if TYPE_CHECKING:
    from flashbone.generation.speaker import Model
    from flashbone.train.decoding import Decoding

MODEL_HELP = "folder, hub id, .gguf file, or an RWKV model's .pth file; or an adapter's folder, for its base with it"


def with_one_model(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The arguments of a command that takes one MODEL; a second one is an adapter without its option."""
    args, more = parser.parse_known_args(argv)
    if more:
        hint = "" if more[0].startswith("-") else f"; an adapter is --adapter {more[0]}"
        parser.error(f"unrecognized arguments: {' '.join(more)}{hint}")
    return args


def at_least(least: float, kind: type = int, most: float | None = None) -> Callable[[str], Any]:
    """A parser of numbers in a range."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (least <= value <= (float("inf") if most is None else most) and value < float("inf")):
            what = "a whole number" if kind is int else "a number"
            wanted = f"{least:g} or more" if most is None else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {what}, {wanted}")
        return value

    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options that say how it is loaded."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("--adapter", dest="adapters", action="append", default=[], metavar="A",
        help="adapter of any format that flashbone reads, or NAME=A; again for more of them")  # fmt: skip
    add("--system", metavar="TEXT", help="system prompt")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the model (fp32 on a CPU, bf16 on a GPU)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    add("--quantization", type=int, choices=(4, 8), help="bits of the base's weights, by bitsandbytes")
    add("--vocabulary", metavar="FILE", help="the tokens of an RWKV model")
    add("--chat-template", type=Path, metavar="FILE", help="a .jinja file, in place of the model's own template")


def add_decoding(parser: argparse.ArgumentParser, seed: int | None) -> None:
    """How tokens are chosen."""
    group = parser.add_argument_group(
        "how an answer is written (the likeliest token each time, unless one of these samples)"
    )
    add = group.add_argument
    add("--max-new-tokens", type=at_least(1), default=512, metavar="N", help="longest answer (512)")
    add("--temperature", type=at_least(0, float), metavar="T", help="sample; higher is more daring, 0 is the likeliest")
    add("--top-p", type=at_least(1e-9, float, 1), metavar="P", help="sample among tokens that have this share")
    add("--top-k", type=at_least(0), metavar="K", help="sample among the K likeliest tokens")
    add("--seed", type=at_least(0), default=seed, metavar="N",
        help=f"of sampling ({'another each time' if seed is None else seed})")  # fmt: skip


def model_of(args: argparse.Namespace) -> Model:
    """The model that a command line asks for; what is on the hub is fetched."""
    from flashbone.generation.speaker import Model

    expand(args, "model", "adapters", "vocabulary", "chat_template")
    if hub.looks_like_hub_id(args.model) and not hub.has_file(args.model, "config.json"):
        args.model = str(hub.folder(args.model)) if hub.has_file(args.model, "adapter_config.json") else args.model
    return Model(
        args.model,
        tuple(map(_adapter, args.adapters)),
        args.dtype,
        args.device,
        args.quantization,
        args.vocabulary,
        args.chat_template,
    )


def _adapter(given: str) -> str:
    """An adapter on this disk; one of the hub is called by its repository."""
    if Path(given).exists():
        return given
    name, equals, place = given.rpartition("=")
    if hub.looks_like_hub_id(place) and not equals:
        name, equals = place.rpartition("/")[2], "="
    return f"{name}{equals}{hub.folder(place)}"


def decoding_of(args: argparse.Namespace) -> Decoding:
    """How a command line asks tokens to be chosen."""
    from flashbone.train.decoding import Decoding

    return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
