"""Draw moves.svg: the three moves of an adapter in one call of a layer, with the shapes that flow.

python docs/images/moves.py
"""

from pathlib import Path

from variants import FILLS, box, page, text

MIDDLE = 170  # where x, the base and y stand, one below the other
FIRST, SECOND = 246, 410  # heights of the two sums
ARROW = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
ARROW += '<path d="M0 0L8 4L0 8Z" class="head"/></marker>'


def flow(*corners: tuple[float, float]) -> str:
    """An arrow along the corners."""
    path = "L".join(f"{x:g} {y:g}" for x, y in corners)
    return f'<path d="M{path}" class="line" marker-end="url(#head)"/>'


def added(y: float) -> str:
    """The sign of a sum."""
    circle = f'<circle cx="{MIDDLE}" cy="{y:g}" r="10" class="box"/>'
    cross = f'<path d="M{MIDDLE - 5} {y:g}h10M{MIDDLE} {y - 5:g}v10" class="line"/>'
    return circle + cross


def step(left: float, top: float, width: float, lines: tuple[str, ...], paint: str) -> str:
    """A box with a heading and lines."""
    found = [box(left, top, width, 14 + 17 * len(lines), f'{paint} rx="4"')]
    kind = "on" if "fill=" in paint else "ink"
    for n, line in enumerate(lines):
        found.append(text(left + 8, top + 19 + 17 * n, line, f"{kind} title" if n == 0 else kind))
    return "\n".join(found)


def coloured(n: int) -> str:
    """The paint of move n."""
    return f'fill="{FILLS[(0, 1, 3)[n]]}" class="cell"'


def svg() -> str:
    """The whole drawing."""
    lines = ("One call of a layer, y = base(x + z) + u + x dWᵀ,", "with the shapes that flow")
    body = [text(18, 28 + 17 * n, line) for n, line in enumerate(lines)]
    body += [
        # The arrows first, so that boxes cover their ends.
        flow((MIDDLE, 96), (MIDDLE, FIRST - 11)),
        flow((MIDDLE, 110), (78, 110), (78, 124)),
        flow((MIDDLE, 110), (234, 110), (234, 160), (250, 160)),
        flow((234, 160), (234, 290), (250, 290)),
        flow((78, 223), (78, FIRST), (MIDDLE - 11, FIRST)),
        flow((24, 223), (24, SECOND), (MIDDLE - 11, SECOND)),
        flow((MIDDLE, FIRST + 10), (MIDDLE, 296)),
        flow((MIDDLE, 344), (MIDDLE, SECOND - 11)),
        flow((364, 160), (372, 160), (372, SECOND), (MIDDLE + 11, SECOND)),
        '<path d="M364 290H372" class="line"/>',
        flow((MIDDLE, SECOND + 10), (MIDDLE, 452)),
        added(FIRST),
        added(SECOND),
        step(MIDDLE - 28, 65, 56, ("x",), 'class="box"'),
        text(MIDDLE + 36, 86, "(tokens, in)", "soft"),
        step(10, 124, 136, ("1 input", "x_b D_bᵀ", "bat-row", "x_b (Q - I)ᵀ", "orthogonal"), coloured(0)),
        step(250, 124, 114, ("2 output", "S(x) B", "bone;", "mini, tiled"), coloured(1)),
        step(250, 250, 114, ("3 weight", "x (W D + D)ᵀ", "bat-col"), coloured(2)),
        step(MIDDLE - 52, 296, 104, ("base", "Wᵀ and bias"), 'class="box"'),
        text(88, FIRST - 7, "z", "ink"),
        text(32, FIRST + 18, "(tokens, in)", "soft"),
        text(MIDDLE - 8, 284, "x + z", "ink end"),
        text(MIDDLE + 10, 364, "(tokens, out)", "soft"),
        text(32, SECOND - 26, "bat-row: sum of z_b,"),
        text(32, SECOND - 8, "(tokens, r), tiled", "soft"),
        text(MIDDLE + 24, SECOND - 8, "u, and x dWᵀ"),
        text(MIDDLE + 24, SECOND + 18, "(tokens, out)", "soft"),
        step(MIDDLE - 28, 452, 56, ("y",), 'class="box"'),
        text(MIDDLE + 36, 473, "(tokens, out)", "soft"),
        text(18, 510, "S(x), the sum of the shards, is (tokens, r). dW is"),
        text(18, 527, "(out, in): where nothing shifts the input, base and"),
        text(18, 544, "dW are one product with W + dW."),
    ]
    title = "The three moves: an adapter shifts the input, the output, or the weight of one call of its layer"
    return page(564, title, [f"<defs>{ARROW}</defs>", *body])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg(), encoding="utf-8")
