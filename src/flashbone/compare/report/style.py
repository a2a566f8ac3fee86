"""Colours, dashes and markers of methods: seven colours after Okabe and Ito (2008), made darker or lighter until they
stand out from a white or a dark ground (contrast of 3 or more) and are told apart in dichromacy; a test holds both."""

LIGHT = ("#0468b3", "#a23600", "#009e73", "#a84b85", "#b5830b", "#4498cb", "#222222")
DARK = ("#3792db", "#e56e28", "#2aba81", "#c581ac", "#ffca46", "#93d1f7", "#f0f1f1")
LIGHT_GROUND, DARK_GROUND = "#fcfcfa", "#16181c"
# From the eighth method on the colours come again, with the next dash and marker (of matplotlib).
DASHES = ((), (6, 3), (1.5, 2.5))
MARKERS = ("o", "s", "^")


def colour(number: int) -> int:
    """Which colour a method has, by its place in the comparison."""
    return number % len(LIGHT)


def dash(number: int) -> int:
    """Which dash and marker a method has."""
    return number // len(LIGHT) % len(DASHES)


def css() -> str:
    """The colours as variables of CSS, for both themes."""
    colours = zip(LIGHT, DARK, strict=True)
    lines = [f"  --c{n}: light-dark({light}, {dark});" for n, (light, dark) in enumerate(colours)]
    ground = f"  --ground: light-dark({LIGHT_GROUND}, {DARK_GROUND});"
    dashes = [f".d{n} {{ stroke-dasharray: {' '.join(map(str, d)) or 'none'}; }}" for n, d in enumerate(DASHES)]
    classes = [f".c{n} {{ --colour: var(--c{n}); }}" for n in range(len(LIGHT))]
    return "\n".join([":root {", ground, *lines, "}", *classes, *dashes, ""])
