"""Draw variants.svg: which trained numbers each block of a weight's change is made of, in the five variants.

python docs/images/variants.py

The page, the colours and the lines of text are those of the other drawings of blocks here, too.
"""

import re
from dataclasses import dataclass
from pathlib import Path

# Told apart by colour-blind eyes as well, and light enough for dark letters: tests/docs/test_maths_drawings.py.
FILLS = ("#9cc3e1", "#f1a323", "#f8eb93", "#ad89f8")
INK = "#1f2328"
STYLE = """
  .page { fill: #ffffff } .ink { fill: #1f2328 } .soft { fill: #59636e } .line { stroke: #59636e; fill: none }
  .head { fill: #59636e } .box { fill: #f6f8fa; stroke: #59636e }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16191d } .ink { fill: #e6e9ec } .soft { fill: #a4adb6 } .line { stroke: #a4adb6; fill: none }
    .head { fill: #a4adb6 } .box { fill: #20252b; stroke: #a4adb6 }
  }
  text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 13px }
  .title { font-size: 15px; font-weight: 600 } .on { fill: #1f2328 } .small, .sub { font-size: 12px }
  .middle { text-anchor: middle } .end { text-anchor: end } .cell { stroke: #2b3137 } .zero { stroke-dasharray: 3 3 }
"""
HATCH = (
    '<pattern id="of-W" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<path d="M0 0V6" stroke="{INK}" stroke-opacity="0.4" stroke-width="1.5"/></pattern>'
)
WIDTH = 380  # of all drawings: on a narrow phone letters stay above ten pixels

OUT, CELL, TAIL = 3, 36, 22  # output shards; the pixels of a block's edge, and of what there is of the ragged shard
IN = 4  # input shards, the last of which is ragged
PANEL, LEFT, TOP, HEIGHT = 180, 18, 112, 250


def text(x: float, y: float, content: str, kind: str = "ink") -> str:
    """A line of text; `D_b` has a subscript."""
    content = re.sub(r"_(\w)", r'<tspan dy="3" class="sub">\1</tspan><tspan dy="-3">&#8203;</tspan>', content)
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{content}</text>'


def box(x: float, y: float, width: float, height: float, paint: str) -> str:
    """A rectangle; `paint` are its attributes."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {paint}/>'


def page(height: float, title: str, body: list[str]) -> str:
    """A whole drawing, on a ground of its own."""
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t">',
            f'<title id="t">{title}</title>',
            f"<style>{STYLE}</style>",
            f"<defs>{HATCH}</defs>",
            box(0, 0, WIDTH, height, 'rx="8" class="page"'),
            *body,
            "</svg>",
            "",
        ]
    )


@dataclass(frozen=True)
class Panel:
    """One variant.

    Attributes:
        name: as the configuration has it.
        shape: of what is trained.
        pieces: names of the squares that it consists of.
        joined: whether they are one matrix.
        bands: into how many each square is cut; then `pieces` are the bands of the one square.
        delta: of the block [a, b].
        reads: whether that multiplies the block of W.
        turns_tail: whether the ragged last input shard is changed, too.
    """

    name: str
    shape: str
    pieces: tuple[str, ...]
    joined: bool
    bands: int
    delta: str
    reads: bool
    turns_tail: bool = True

    @property
    def squares(self) -> int:
        """How many."""
        return len(self.pieces) // self.bands

    def piece_at(self, a: int, b: int) -> int:
        """Which square the block [a, b] is made of: one for each output shard, for each input shard, or for all."""
        return {OUT: a, IN: b, 1: 0}[self.squares]


PANELS = (
    Panel("bone", "B (r, out)", ("B₁", "B₂", "B₃"), True, 1, "B[:, a]ᵀ", False),
    Panel("mini", "B (r, mini_r)", ("B₁", "B₂"), True, 2, "Bᵀ, tiled along out", False),
    Panel("bat-row", "D (n_in, r, r)", ("D₁", "D₂", "D₃", "D₄"), False, 1, "W[a,b] D_b + D_b", True),
    Panel("bat-col", "D (n_out, r, r)", ("D₁", "D₂", "D₃"), False, 1, "W[a,b] D_a + D_a", True),
    Panel("orthogonal", "P (r, r), giving Q", ("Q",), False, 1, "W[a,b] (Q - I)", True, False),
)


def square(x: float, y: float, piece: int, panel: Panel, hatched: bool, upright: bool, width: float = CELL) -> str:
    """One block; `upright`: its bands stand side by side, as columns of B do."""
    found, step = [], CELL / panel.bands
    for band in range(panel.bands):
        at = (x + band * step, y, step, CELL) if upright else (x, y + band * step, width, step)
        found.append(box(*at, f'fill="{FILLS[piece + band]}" class="cell"'))
        if hatched:
            found.append(box(*at, 'fill="url(#of-W)"'))
        middle = at[0] + at[2] / 2, at[1] + at[3] / 2 + 4
        found.append(text(*middle, panel.pieces[piece + band], f"on middle{' small' if panel.bands > 1 else ''}"))
    return "\n".join(found)


def drawn(panel: Panel, left: float, top: float) -> list[str]:
    """One panel: what is trained, the change, and its formula."""
    shape = panel.shape.replace("_", "&#95;")  # sizes are words, no subscripts
    found = [text(left, top, panel.name, "ink title"), text(left, top + 19, f"trains {shape}", "soft")]
    gap = 0 if panel.joined else 3
    for piece in range(panel.squares):
        found.append(square(left + piece * (CELL + gap), top + 28, piece, panel, False, True))
    grid = top + 28 + CELL + 12
    for a in range(OUT):
        for b in range(IN):
            at = left + b * CELL, grid + a * CELL
            ragged = b == IN - 1
            if ragged and not panel.turns_tail:
                found += [
                    box(*at, TAIL, CELL, 'class="line zero"'),
                    text(at[0] + TAIL / 2, at[1] + 22, "0", "soft middle"),
                ]
            else:
                width = TAIL if ragged else CELL
                found.append(square(*at, panel.piece_at(a, b), panel, panel.reads, False, width))
    below = grid + OUT * CELL
    return [*found, text(left, below + 18, "block [a,b] of the change:", "soft"), text(left, below + 36, panel.delta)]


def key(left: float, top: float) -> list[str]:
    """What plain, hatched and empty squares mean."""
    entries = (
        (f'fill="{FILLS[0]}" class="cell"', ("the same, whatever", "W is: of rank r or", "less, a LoRA")),
        ('fill="url(#of-W)" class="cell"', ("multiplied to the", "block of W there: of", "any rank, no LoRA")),
        ('class="line zero"', ("left alone",)),
    )
    found = []
    for paint, lines in entries:
        found.append(box(left, top, 18, 18, paint))
        if "of-W" in paint:
            found.insert(-1, box(left, top, 18, 18, f'fill="{FILLS[0]}"'))
        found += [text(left + 26, top + 13 + 17 * n, line) for n, line in enumerate(lines)]
        top += 17 * len(lines) + 14
    return found


def svg() -> str:
    """The whole drawing."""
    lines = (
        "Above: what is trained. Below: where it goes in",
        "the change of W, in blocks of r x r. Here out is",
        "3 r, and the last input shard is ragged: what of",
        "its blocks sticks out is cropped.",
    )
    body = [text(LEFT, 28 + 17 * n, line) for n, line in enumerate(lines)]
    for n, panel in enumerate(PANELS):
        body += drawn(panel, LEFT + n % 2 * PANEL, TOP + n // 2 * HEIGHT)
    body += key(LEFT + PANEL, TOP + 2 * HEIGHT + 40)
    return page(TOP + 3 * HEIGHT - 12, "The block layouts of bone, mini, bat-row, bat-col and orthogonal", body)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg(), encoding="utf-8")
