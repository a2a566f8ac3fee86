"""What ends a benchmark: the command line prints each in one line."""


class BenchmarkError(Exception):
    """A measurement failed; the command exits with 1."""


class UsageError(BenchmarkError):
    """What was asked for cannot be done; the command exits with 2."""
