"""How numbers are written in the tables. Limits lie where rounding reaches the next unit or a digit more."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes, in the largest unit that leaves at least 1: `26.4 MiB`."""
    unit = 0
    while round(count) >= 1024 and unit + 1 < len(UNITS):
        count, unit = count / 1024, unit + 1
    return f"{count:,.0f} {UNITS[unit]}" if not unit else f"{_three(count)} {UNITS[unit]}"


def number(count: float) -> str:
    """A count in short: `524,288` to six digits, then `13.1 M`, `6.74 B`."""
    for limit, factor, letter in ((999_999.5, 1, ""), (999.5e6, 1e6, " M"), (float("inf"), 1e9, " B")):
        if count < limit:
            return f"{count:,.0f}" if factor == 1 else f"{_three(count / factor)}{letter}"
    raise AssertionError(count)


def percent(share: float) -> str:
    """To three digits: `0.124 %`, `1.30 %`."""
    return f"{share:#.3g} %" if share < 99.95 else f"{share:,.0f} %"


def sizes(shape: tuple[int, ...]) -> str:
    """`64 x 4096`."""
    return " x ".join(map(str, shape))


def times(names: str, count: int) -> str:
    """`layers.{0..31}.o_proj x 32`; alone, the name."""
    return f"{names} x {count}" if count > 1 else names


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
