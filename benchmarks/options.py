"""The command line: `python -m benchmarks BENCHMARK [options]`, and what it means for a run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.cases import DTYPES, MODEL, MODEL_OF_FP32, MODELS
from benchmarks.methods import METHODS
from benchmarks.report import add_arguments as add_report_arguments
from benchmarks.roofline.command import add_arguments as add_roofline_arguments


@dataclass(frozen=True)
class Spec:
    """What a benchmark offers.

    Attributes:
        help: One line.
        parts: Its parts, in order.
        rounds, warmup: How often, unless asked otherwise.
        dtypes: The dtypes of a run that names none.
        has_model: Whether it runs on a language model.
        tests: Of the ops that it measures; nothing is measured while they fail.
    """

    help: str
    parts: tuple[str, ...]
    rounds: int
    warmup: int = 2
    dtypes: tuple[str, ...] = ("float32",)
    has_model: bool = True
    tests: str = "tests/ops"


TRAINING = tuple(DTYPES.values())
SPECS = {
    "layer": Spec(
        "one linear layer, forward and backward",
        ("shapes", "tokens", "r", "adapters"),
        20,
        dtypes=("bfloat16", "float32"),
        has_model=False,
    ),
    "step": Spec("a training step of a language model", ("main", "targets"), 10, dtypes=TRAINING),
    "memory": Spec(
        "peak memory of training steps", ("main", "live", "alive", "tokens", "r", "adapters"), 3, 0, TRAINING
    ),
    "decode": Spec(
        "one layer, one token", ("main", "middle", "small"), 30, dtypes=("bfloat16", "float32"), has_model=False
    ),
    "forward": Spec("inference of BERT-base with adapted attention outputs", ("main",), 40, has_model=False),
    "mixed": Spec("a batch whose rows belong to 8 adapters", ("prefill", "decode"), 12, dtypes=("bfloat16", "float32")),
    "load": Spec("importing the packages, loading an adapter", ("import", "adapter"), 10, warmup=1),
    "merge": Spec("merging into a live model and into files", ("live", "command"), 10, warmup=1),
    "train": Spec(
        "whole runs over chats, beside TRL with LoRA and MiSS",
        ("plain", "packing", "padding-free", "conversations", "answers"),
        3,
        warmup=0,
        dtypes=(TRAINING[0], TRAINING[-1]),
        tests="tests/train/test_tokens.py",
    ),
    "wkv": Spec(
        "RWKV's time mixing, in chunks and token by token",
        ("forward", "training"),
        10,
        has_model=False,
        tests="tests/rwkv/test_wkv.py",
    ),
}


@dataclass(frozen=True)
class Options:
    """What a run was asked for; `quick` sizes are only good for tests of the benchmarks themselves."""

    benchmark: str
    parts: tuple[str, ...]
    methods: tuple[str, ...] | None
    rounds: int
    warmup: int
    threads: int
    dtypes: tuple[str, ...]
    dtype_is_asked_for: bool
    device: str
    model: str
    quick: bool
    out: Path | None

    def pick(self, names: tuple[str, ...] | list[str]) -> list[str]:
        """Those of `names` that were asked for."""
        return [name for name in names if self.methods is None or name in self.methods]


class _Parser(argparse.ArgumentParser):
    """Wrong usage in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = _Parser(prog="python -m benchmarks", description="Time and memory of the methods, measured side by side.")
    commands = top.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, spec in SPECS.items():
        command = commands.add_parser(name, help=spec.help, description=spec.help)
        command.add_argument("--part", choices=[*spec.parts, "all"], default="all", help="measure only this part")
        command.add_argument("--methods", type=_methods, help=f"a,b,c of: {', '.join(METHODS)}")
        command.add_argument("--rounds", type=_positive, help=f"counted rounds (default: {spec.rounds})")
        command.add_argument("--threads", type=_positive, default=2, help="CPU threads (default: 2)")
        command.add_argument("--dtype", choices=DTYPES, help="of the base (default: all that the benchmark has)")
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        command.add_argument("--out", type=Path, help="write the rows here, not into benchmarks/results")
        command.add_argument("--quick", action="store_true", help="tiny sizes, few rounds, no op tests, no results")
        if "alive" in spec.parts:
            command.add_argument("--alive", dest="part", action="store_const", const="alive", help="as --part alive")
        if spec.has_model:
            command.add_argument(
                "--model",
                choices=MODELS,
                help=f"shape, with random weights (default: {MODEL}; {MODEL_OF_FP32} in fp32)",
            )
    roofline = commands.add_parser("roofline", help="what the methods would cost on a GPU: predicted, nothing is run")
    add_roofline_arguments(roofline)
    report = commands.add_parser("report", help="all that wants a GPU, in one folder with a page")
    add_report_arguments(report)
    tables = commands.add_parser("tables", help="rewrite docs/benchmarks.md and its plots from the results")
    tables.add_argument("--check", action="store_true", help="exit with 1 if the page is not what the results give")
    return top


def options_of(parsed: argparse.Namespace) -> Options:
    """The options of a benchmark."""
    spec, given = SPECS[parsed.benchmark], vars(parsed)
    return Options(
        benchmark=parsed.benchmark,
        parts=spec.parts if parsed.part == "all" else (parsed.part,),
        methods=parsed.methods,
        rounds=parsed.rounds or (2 if parsed.quick else spec.rounds),
        warmup=min(spec.warmup, 1) if parsed.quick else spec.warmup,
        threads=parsed.threads,
        dtypes=(DTYPES[parsed.dtype],) if parsed.dtype else spec.dtypes,
        dtype_is_asked_for=parsed.dtype is not None,
        device=parsed.device,
        model=given.get("model") or ("tiny" if parsed.quick else ""),
        quick=parsed.quick,
        out=parsed.out,
    )


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, wanted some of {', '.join(METHODS)}")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)
