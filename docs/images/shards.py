"""Draw shards.svg: how a weight, its input and its output are cut into shards and blocks, ragged last shards included.

python docs/images/shards.py
"""

from pathlib import Path

from variants import FILLS, WIDTH, box, page, text

OUT, IN, R = 10, 14, 4  # neither size is a multiple of R
N_OUT, N_IN = -(-OUT // R), -(-IN // R)
UNIT, LEFT, TOP = 18, 70, 150  # pixels of a feature; where W begins
BELOW = TOP + N_OUT * R * UNIT
SUBSCRIPTS = "₁₂₃₄"


def feature(x: float, y: float, height: float, paint: str | None, width: float = UNIT) -> str:
    """One feature, or a zero that fills a shard up (`paint` None)."""
    if paint is None:
        zero = text(x + width / 2, y + height / 2 + 4, "0", "soft middle small")
        return box(x, y, width, height, 'class="line zero"') + zero
    return box(x, y, width, height, f'fill="{paint}" class="cell"')


def input_shards(left: float, top: float, gap: float, named: bool) -> list[str]:
    """The shards of x side by side."""
    found = []
    for b in range(N_IN):
        start = left + b * (R * UNIT + gap)
        for j in range(R):
            found.append(feature(start + j * UNIT, top, 22, FILLS[b] if b * R + j < IN else None))
        if named:
            found.append(text(start + R * UNIT / 2, top - 7, f"x{SUBSCRIPTS[b]}", "ink middle"))
        elif b:
            found.append(text(start - gap / 2, top + 16, "+", "ink middle"))
    return found


def output_shards() -> list[str]:
    """The shards of y, one below the other, at the left of W."""
    found = []
    for a in range(N_OUT):
        for i in range(R):
            paint = "#ffffff" if a * R + i < OUT else None
            found.append(feature(LEFT - 30, TOP + (a * R + i) * UNIT, UNIT, paint, 22))
        found.append(text(LEFT - 36, TOP + (a + 0.5) * R * UNIT + 4, f"y{SUBSCRIPTS[a]}", "ink end"))
    return found


def blocks() -> list[str]:
    """W, cut into blocks; what pads the last ones is dashed."""
    found = [box(LEFT, TOP, N_IN * R * UNIT, N_OUT * R * UNIT, 'class="line zero"')]
    for a in range(N_OUT):
        for b in range(N_IN):
            width, height = min(R, IN - b * R) * UNIT, min(R, OUT - a * R) * UNIT
            at = LEFT + b * R * UNIT, TOP + a * R * UNIT
            found.append(box(*at, width, height, f'fill="{FILLS[b]}" class="cell"'))
            kind = "on middle small" if b == N_IN - 1 else "on middle"
            found.append(text(at[0] + width / 2, at[1] + height / 2 + 4, f"[{a + 1},{b + 1}]", kind))
    right, bottom = LEFT + IN * UNIT, TOP + OUT * UNIT
    for row in range(N_OUT * R):
        found += zeros(right, TOP + row * UNIT, N_IN * R - IN)
    for row in range(OUT, N_OUT * R):
        found += zeros(LEFT, bottom + (row - OUT) * UNIT, IN)
    return found


def zeros(left: float, top: float, count: int) -> list[str]:
    """A row of them."""
    return [text(left + (n + 0.5) * UNIT, top + UNIT / 2 + 4, "0", "soft middle small") for n in range(count)]


def shard_sum(top: float) -> list[str]:
    """S(x)."""
    gap = 14
    left = (WIDTH - N_IN * R * UNIT - (N_IN - 1) * gap) / 2
    found = [text(18, top, "S(x) = x₁ + x₂ + x₃ + x₄, r numbers:"), *input_shards(left, top + 12, gap, False)]
    found.append(text(left + 12, top + 65, "="))
    for j in range(R):
        found.append(box(left + 30 + j * UNIT, top + 49, UNIT, 22, 'class="box"'))
    return [*found, text(left + 30 + R * UNIT + 10, top + 65, "S(x)")]


def svg() -> str:
    """The whole drawing."""
    lines = (
        f"W (out, in) is {OUT} x {IN} here, and r is {R}: the input",
        f"has {N_IN} shards, the output {N_OUT}, and block [a,b] of W",
        "is r x r. Dashed: zeros, which fill up the last",
        "shards; what comes out there is cropped.",
    )
    body = [text(18, 28 + 17 * n, line) for n, line in enumerate(lines)]
    body += [*input_shards(LEFT, TOP - 36, 0, True), text(LEFT - 8, TOP - 20, "x", "ink end")]
    body += [*blocks(), *output_shards(), *shard_sum(BELOW + 30)]
    title = "A weight of 10 x 14 cut into blocks of 4 x 4, its last shards filled up with zeros"
    return page(BELOW + 118, title, body)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg(), encoding="utf-8")
