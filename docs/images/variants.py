"""Draw variants.svg: which trained numbers each block of a weight's change is made of, in the five variants.

python docs/images/variants.py
"""

from dataclasses import dataclass
from pathlib import Path

OUT, IN, CELL = 3, 4, 34  # output and input shards, and the pixels of a block's edge
PANEL, LEFT, TOP, GRID_TOP = 186, 24, 64, 154
FILLS = ("#8ecae6", "#ffd28f", "#b5dd8b", "#dcb8ec")
STYLE = """
  .page { fill: #ffffff } .ink { fill: #1f2328 } .soft { fill: #59636e } .line { stroke: #59636e; fill: none }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16191d } .ink { fill: #e6e9ec } .soft { fill: #a4adb6 } .line { stroke: #a4adb6; fill: none }
  }
  text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px }
  .title { font-size: 15px; font-weight: 600 } .on { fill: #1f2328; text-anchor: middle } .cell { stroke: #2b3137 }
"""


@dataclass(frozen=True)
class Panel:
    """One variant.

    Attributes:
        name: as the configuration has it.
        shape: of what is trained.
        pieces: names of the squares that it consists of.
        joined: whether they are one matrix.
        bands: into how many each square is cut.
        delta: of the block [a, b].
        reads: whether that multiplies the block of W.
    """

    name: str
    shape: str
    pieces: tuple[str, ...]
    joined: bool
    bands: int
    delta: str
    reads: bool

    def piece_at(self, a: int, b: int) -> int:
        """Which square the block [a, b] is made of: one for each output shard, for each input shard, or for all."""
        return {OUT: a, IN: b, 1: 0}[len(self.pieces)]


PANELS = (
    Panel("bone", "B (r, out)", ("B₁", "B₂", "B₃"), True, 1, "B[a]ᵀ", False),
    Panel("mini", "B (r, mini_r)", ("B",), True, 2, "Bᵀ, repeated", False),
    Panel("bat-row", "D (in/r, r, r)", ("D₁", "D₂", "D₃", "D₄"), False, 1, "W[a,b] D[b] + D[b]", True),
    Panel("bat-col", "D (out/r, r, r)", ("D₁", "D₂", "D₃"), False, 1, "W[a,b] D[a] + D[a]", True),
    Panel("orthogonal", "P (r, r), giving Q", ("Q",), False, 1, "W[a,b] (Q - I)", True),
)


def text(x: float, y: float, content: str, kind: str = "ink") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{content}</text>'


def square(x: float, y: float, piece: int, panel: Panel, hatched: bool, upright: bool) -> list[str]:
    """One block; `upright`: its bands stand side by side, as columns of B do."""
    found, step = [], CELL / panel.bands
    for band in range(panel.bands):
        at = (x + band * step, y, step, CELL) if upright else (x, y + band * step, CELL, step)
        box = 'x="{:g}" y="{:g}" width="{:g}" height="{:g}"'.format(*at)
        found.append(f'<rect {box} fill="{FILLS[piece + band]}" class="cell"/>')
    if hatched:
        found.append(f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="url(#of-W)"/>')
    return found if panel.bands > 1 else [*found, text(x + CELL / 2, y + CELL / 2 + 4, panel.pieces[piece], "on")]


def drawn(panel: Panel, left: float) -> list[str]:
    """One panel: what is trained, the change, and its formula."""
    found = [text(left, TOP, panel.name, "ink title"), text(left, TOP + 20, f"trained: {panel.shape}", "soft")]
    gap = 0 if panel.joined else 4
    for piece in range(len(panel.pieces)):
        found += square(left + piece * (CELL + gap), TOP + 32, piece, panel, False, True)
    for a in range(OUT):
        for b in range(IN):
            found += square(left + b * CELL, GRID_TOP + a * CELL, panel.piece_at(a, b), panel, panel.reads, False)
    below = GRID_TOP + OUT * CELL
    return [*found, text(left, below + 20, "block [a,b] of the change:", "soft"), text(left, below + 38, panel.delta)]


def svg() -> str:
    """The whole drawing."""
    width, height = LEFT + PANEL * len(PANELS), GRID_TOP + OUT * CELL + 92
    body = [
        text(LEFT, 30, "What is trained (above), and where it goes in the change of W, cut into r x r blocks (below)")
    ]
    for n, panel in enumerate(PANELS):
        body += drawn(panel, LEFT + n * PANEL)
    y = height - 34
    body += [
        f'<rect x="{LEFT}" y="{y}" width="18" height="18" fill="{FILLS[0]}" class="cell"/>',
        text(LEFT + 26, y + 13, "the same, whatever W is: the change is a matrix of rank r or less, a LoRA"),
        f'<rect x="{LEFT + 500}" y="{y}" width="18" height="18" fill="{FILLS[0]}" class="cell"/>',
        f'<rect x="{LEFT + 500}" y="{y}" width="18" height="18" fill="url(#of-W)"/>',
        text(LEFT + 526, y + 13, "multiplied to the block of W in that place: of any rank, no LoRA"),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    hatch = '<pattern id="of-W" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    hatch += '<path d="M0 0V6" stroke="#1f2328" stroke-opacity="0.35" stroke-width="1.5"/></pattern>'
    return "\n".join(
        [
            f'{head} role="img" aria-labelledby="t">',
            '<title id="t">The block layouts of bone, mini, bat-row, bat-col and orthogonal</title>',
            f"<style>{STYLE}</style>",
            f"<defs>{hatch}</defs>",
            f'<rect width="{width}" height="{height}" rx="8" class="page"/>',
            *body,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg(), encoding="utf-8")
