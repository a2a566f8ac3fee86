"""The targets of the project, each held against the rows: paired ratios of two methods of one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.cases import DTYPES
from benchmarks.rows import Row, paired_ratios, spread
from benchmarks.tables.markdown import is_current


@dataclass(frozen=True)
class Target:
    """A limit for the ratio of two methods' figures.

    Attributes:
        claim: What is compared, in words.
        limit: The largest median that meets it.
        rows: Benchmark, part and metric that it is about.
        method, adapters: What is measured.
        against, against_adapters: What it is divided by, round by round.
        shape: Entries of the shape that the rows must have.
        threads: As the rows' device names them.
        dtype: Of the rows.
        within_spread: Met already if the first quartile is within the limit: for "costs nothing".
    """

    claim: str
    limit: float
    rows: tuple[str, str, str]
    method: str
    against: str
    adapters: int = 1
    against_adapters: int = 1
    shape: dict[str, int] = field(default_factory=dict)
    threads: str = "2 threads"
    dtype: str = "float32"
    within_spread: bool = False


BF16_AUTOCAST, BF16, _ = DTYPES.values()
STEP = ("step", "targets", "time_ms")
MEMORY = ("memory", "main", "above_floor_mib")
LAYER, DECODE = ("layer", "shapes", "time_ms"), ("decode", "main", "time_ms")
FORWARD = ("forward", "main", "time_ms")
WIDE = {"tokens": 512, "in": 4096, "out": 4096}
SHAPES = (WIDE, {"tokens": 1024, "in": 1536, "out": 1536}, {"tokens": 512, "in": 576, "out": 1536})


def _layer(method: str, limit: float) -> Target:
    claim = f"layer 4096 x 4096, 512 tokens: {method} / frozen"
    return Target(claim, limit, LAYER, method, "frozen", shape=WIDE, against_adapters=0)


def _ten(shape: dict[str, int]) -> Target:
    claim = f"layer {shape['in']} x {shape['out']}, {shape['tokens']} tokens: ten bone adapters / one"
    return Target(claim, 1.3, LAYER, "bone", "bone", adapters=10, shape=shape)


def _decode(method: str, limit: float, within_spread: bool = False) -> Target:
    claim = f"decoding one token, 4096 x 4096: {method} / frozen"
    return Target(claim, limit, DECODE, method, "frozen", against_adapters=0, within_spread=within_spread)


def _small(method: str, limit: float) -> Target:
    claim = f"one call of a 64 x 64 layer in a generation: {method} / MiSS"
    return Target(claim, limit, ("decode", "small", "time_ms"), method, "miss")


def _decode_to(part: str, size: str, against: str, dtype: str) -> Target:
    claim = f"decoding one token, {size}, {dtype}: bone / {against}"
    return Target(claim, 0.97, ("decode", part, "time_ms"), "bone", against, dtype=dtype)


def _step_in_bf16(dtype: str, method: str, against: str, limit: float) -> Target:
    claim = f"step, {dtype}: {method} / {against}"
    adapters = 0 if against == "frozen" else 1
    return Target(claim, limit, STEP, method, against, against_adapters=adapters, dtype=dtype)


def _forward(method: str, limit: float, within_spread: bool = False) -> Target:
    claim = f"forward of BERT-base, 8 x 128 tokens, one thread: {method} / frozen"
    one = {"against_adapters": 0, "threads": "1 thread"}
    return Target(claim, limit, FORWARD, method, "frozen", within_spread=within_spread, **one)


def _mixed(variant: str, part: str) -> Target:
    claim = f"mixed batch, 32 rows of {'16 tokens' if part == 'prefill' else 'one token'}: {variant}, 8 adapters / one"
    return Target(claim, 1.5, ("mixed", part, "time_ms"), variant, variant, adapters=8)


def _wkv(version: int, part: str) -> Target:
    what = "forward" if part == "forward" else "forward and backward"
    claim = f"time mixing of RWKV-{version}, 512 tokens, 12 heads of 64, {what}, one thread: chunks / loop"
    shape = {"version": version, "batch": 1, "heads": 12, "size": 64, "tokens": 512}
    rows = ("wkv", part, "time_ms")
    none = {"adapters": 0, "against_adapters": 0, "threads": "1 thread"}
    return Target(claim, 0.25, rows, "wkv-chunked", "wkv-loop", shape=shape, **none)


VARIANTS = ("bone", "mini", "bat-row", "bat-col", "orthogonal")
SMALL = {"bone": 0.65, "mini": 0.8, "bat-col": 0.65, "orthogonal": 0.9, "bat-row": 1.2}
STEPS_IN_BF16 = {
    BF16_AUTOCAST: (
        ("bone", "frozen", 1.10),
        ("bone", "lora", 0.87),
        ("bone", "miss", 0.92),
        ("bat-row", "lora", 1.0),
        ("bat-col", "miss-bat", 0.88),
    ),
    BF16: (
        ("bone", "lora", 0.72),
        ("bone", "miss", 0.75),
        ("bat-row", "lora", 0.85),
        ("bat-col", "miss-bat", 0.38),
    ),
}
TARGETS = (
    Target("step: bone / MiSS", 0.95, STEP, "bone", "miss"),
    Target("step: bone / LoRA", 0.95, STEP, "bone", "lora"),
    Target("memory above the floor: bone / MiSS", 0.55, MEMORY, "bone", "miss"),
    Target("memory above the floor: bone / LoRA", 0.35, MEMORY, "bone", "lora"),
    Target("step: bat-col / MiSS bat", 0.90, STEP, "bat-col", "miss-bat"),
    Target("memory above the floor: bat-col / MiSS bat", 0.20, MEMORY, "bat-col", "miss-bat"),
    Target("step: bat-row / MiSS bat", 0.85, STEP, "bat-row", "miss-bat"),
    Target("memory above the floor: bat-row / MiSS bat", 0.25, MEMORY, "bat-row", "miss-bat"),
    Target("step: bat-row / bone", 1.12, STEP, "bat-row", "bone"),
    _layer("bone", 1.05),
    _layer("bat-row", 1.12),
    _layer("bat-col", 2.1),
    *(_ten(shape) for shape in SHAPES),
    _decode("bone", 1.02),
    *(_small(method, limit) for method, limit in SMALL.items()),
    *(
        _decode_to(part, size, against, dtype)
        for part, size in (("main", "4096 x 4096"), ("middle", "2048 x 2048"))
        for against in ("miss", "lora")
        for dtype in ("bfloat16", "float32")
    ),
    *(_step_in_bf16(dtype, *row) for dtype, rows in STEPS_IN_BF16.items() for row in rows),
    _decode("bone-merged", 1.0, within_spread=True),
    _decode("bone-unloaded", 1.0, within_spread=True),
    _forward("orthogonal", 1.02),
    _forward("orthogonal-merged", 1.0, within_spread=True),
    _forward("orthogonal-unloaded", 1.0, within_spread=True),
    *(_mixed(variant, part) for part in ("prefill", "decode") for variant in VARIANTS),
    *(_wkv(version, part) for version in (7, 6) for part in ("training", "forward")),
)


def ratios(rows: list[Row], target: Target) -> list[float]:
    """The target's ratio in each round of its latest run; empty if that was not measured."""
    fitting = [
        row
        for row in rows
        if (row.benchmark, row.part, row.metric) == target.rows
        and (row.dtype, is_current(row)) == (target.dtype, True)
        and row.device.endswith(f", {target.threads}")
        and target.shape.items() <= row.shape.items()
    ]
    latest = max((row.date for row in fitting), default="")
    found = {(row.method, row.adapters): row.per_round for row in fitting if row.date == latest}
    above = found.get((target.method, target.adapters))
    below = found.get((target.against, target.against_adapters))
    return paired_ratios(above, below) if above and below else []


@dataclass(frozen=True)
class Outcome:
    """What was measured of a target: the median ratio with its quartiles, and whether that meets it."""

    target: Target
    median: float
    quartiles: tuple[float, float]
    met: bool


def outcomes(rows: list[Row]) -> Iterator[Outcome]:
    """Every target that was measured."""
    for target in TARGETS:
        if values := ratios(rows, target):
            found = spread(values)
            met = (found["q1"] if target.within_spread else found["median"]) <= target.limit
            yield Outcome(target, found["median"], (found["q1"], found["q3"]), met)


def met(rows: list[Row]) -> str:
    """How many targets were met; docs/tried.md has the others, with their reasons."""
    found = list(outcomes(rows))
    return f"**{sum(outcome.met for outcome in found)} of {len(found)} targets were met.**" if found else ""
