"""Draw overview.svg: what the family does, in one picture; the first one of README.md and of the site.

python docs/images/overview.py
"""

from pathlib import Path

from variants import FILLS, box, page, text

N_OUT, N_IN, CELL = 3, 4, 26  # blocks of W along its two sides; the pixels of one
TOP, W_LEFT, CHANGE_LEFT, B_LEFT = 118, 18, 150, 282
SUBSCRIPTS = "₁₂₃"


def grid(left: float, paint: list[str]) -> list[str]:
    """Blocks of a weight; `paint` are the attributes of the blocks of each output shard."""
    return [box(left + b * CELL, TOP + a * CELL, CELL, CELL, paint[a]) for a in range(N_OUT) for b in range(N_IN)]


def svg() -> str:
    """The whole drawing."""
    lines = (
        "Bone leaves the weight W of a layer as it is, and",
        "adds a change in which all input shards share",
        "the same blocks: the only numbers that are trained.",
    )
    body = [text(18, 28 + 17 * n, line) for n, line in enumerate(lines)]
    colours = [f'fill="{FILLS[a]}" class="cell"' for a in range(N_OUT)]
    body += grid(W_LEFT, ['class="box"'] * N_OUT) + grid(CHANGE_LEFT, colours)
    for a in range(N_OUT):
        name = f"B{SUBSCRIPTS[a]}"
        for b in range(N_IN):
            at = CHANGE_LEFT + (b + 0.5) * CELL, TOP + (a + 0.5) * CELL + 4
            body.append(text(*at, name, "on middle small"))
        body.append(box(B_LEFT + a * CELL, TOP, CELL, CELL, colours[a]))
        body.append(text(B_LEFT + (a + 0.5) * CELL, TOP + CELL / 2 + 4, name, "on middle small"))
    body.append(text((W_LEFT + N_IN * CELL + CHANGE_LEFT) / 2, TOP + N_OUT * CELL / 2 + 5, "+", "title ink middle"))
    heads = ((W_LEFT, "W, frozen"), (CHANGE_LEFT, "its change"), (B_LEFT, "B, trained"))
    body += [text(left, TOP - 10, name, "title ink") for left, name in heads]
    below = TOP + N_OUT * CELL + 20
    body += [text(W_LEFT, below, "out x in", "soft"), text(CHANGE_LEFT, below, "rank r or less", "soft")]
    body.append(text(B_LEFT, TOP + CELL + 20, "r x out", "soft"))
    body.append(text(18, below + 28, "y = W x + Bᵀ (x₁ + x₂ + ...), the sum of x's shards"))
    return page(below + 46, "W plus a change whose blocks are the same for every input shard", body)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg(), encoding="utf-8")
