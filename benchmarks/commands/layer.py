"""One linear layer, forward and backward: all methods at three shapes, and growth with tokens, r and adapters."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import Setting
from benchmarks.methods import METHODS, TRAINED
from benchmarks.rows import Row
from benchmarks.run import Run

GROWING = ("lora", "miss", "bone", "bat-row", "bat-col")
MANY_ADAPTERS = 10
# A repetition of a small layer repeats it until it takes about as long as one call of the largest.
WORK_OF_A_REPETITION, MOST_CALLS = 5e9, 10


@dataclass(frozen=True)
class Sizes:
    """Shapes as (tokens, in, out), and what grows; `edge` is in and out of the layer of the growth parts."""

    shapes: tuple[tuple[int, int, int], ...]
    edge: int
    tokens: tuple[int, int, int]
    r: tuple[int, int, int]
    adapters: tuple[int, ...] = (1, 4, MANY_ADAPTERS)

    @property
    def middle(self) -> tuple[int, int]:
        """Tokens and r where they do not grow."""
        return self.tokens[1], self.r[1]


FULL = Sizes(((512, 4096, 4096), (1024, 1536, 1536), (512, 576, 1536)), 1536, (256, 1024, 4096), (16, 64, 128))
QUICK = Sizes(((8, 32, 32), (16, 32, 32), (8, 32, 64)), 32, (4, 8, 16), (4, 8, 16))


def measure(run: Run) -> list[Row]:
    """The rows of a part."""
    sizes = QUICK if run.options.quick else FULL
    tokens, r = sizes.middle
    edge = sizes.edge
    growing = run.options.pick(GROWING)
    several = [name for name in growing if METHODS[name].several]
    if run.part == "shapes":
        names = run.options.pick([name for name in TRAINED if name != "frozen"])
        settings = [Setting(name, r) for name in names]
        settings += [Setting(name, r, MANY_ADAPTERS) for name in ("bone", "lora") if name in names]
        return [row for shape in sizes.shapes for row in _layer(run, shape, settings)]
    if run.part == "tokens":
        settings = [Setting(name, r) for name in growing]
        return [row for count in sizes.tokens for row in _layer(run, (count, edge, edge), settings)]
    if run.part == "r":
        return _layer(run, (tokens, edge, edge), [Setting(name, size) for size in sizes.r for name in growing])
    settings = [Setting(name, r, count) for count in sizes.adapters for name in several]
    return _layer(run, (tokens, edge, edge), settings + [Setting(name, r) for name in growing if name not in several])


def _layer(run: Run, shape: tuple[int, int, int], settings: list[Setting]) -> list[Row]:
    tokens, in_features, out_features = shape
    calls = min(max(round(WORK_OF_A_REPETITION / (tokens * in_features * out_features)), 1), MOST_CALLS)
    case = run.case("layer", {"tokens": tokens, "in": in_features, "out": out_features}, calls=calls)
    return run.measure(case, settings)
