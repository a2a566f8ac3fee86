"""How the tables of inspect write numbers."""

import pytest

from flashbone.inspect.words import number, percent, size


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0, "0.00 %"), (0.1235, "0.123 %"), (1.3, "1.30 %"), (99.94, "99.9 %"), (99.97, "100 %"), (1234.5, "1,234 %")],
)
def test_shares_have_three_digits(share, wanted):
    assert percent(share) == wanted


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1.00 KiB"),
        (9.996 * 1024, "10.0 KiB"),
        (99.97 * 1024, "100 KiB"),
        (1023 * 1024, "1,023 KiB"),
        (1_048_575, "1.00 MiB"),
        (2**40 - 1, "1.00 TiB"),
        (5000 * 2**40, "5,000 TiB"),
    ],
)
def test_sizes_are_below_1024_of_their_unit(count, wanted):
    assert size(count) == wanted


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (999_999, "999,999"),
        (999_999.7, "1.00 M"),
        (9_996_000, "10.0 M"),
        (999_499_999, "999 M"),
        (999_999_999, "1.00 B"),
        (70e9, "70.0 B"),
    ],
)
def test_counts_are_below_1000_of_their_unit(count, wanted):
    assert number(count) == wanted
