"""`python -m benchmarks BENCHMARK`, or `tables`, from the root of the repository; `--help` names them."""

from __future__ import annotations

import sys

from benchmarks.errors import BenchmarkError, UsageError
from benchmarks.options import options_of, parser
from benchmarks.workers import Pool


def main(argv: list[str] | None = None, pool: Pool | None = None) -> int:
    """Run a command; the exit code. `pool` lends workers that run already."""
    parsed = parser().parse_args(argv)
    try:
        if parsed.benchmark == "tables":
            from benchmarks.tables import write

            return write(check=parsed.check)
        if parsed.benchmark == "roofline":
            from benchmarks.roofline.command import main as predict

            return predict(parsed, pool)
        if parsed.benchmark == "report":
            from benchmarks.report import main as report

            return report(parsed, pool)
        from benchmarks.run import run

        options = options_of(parsed)
        if pool is not None:
            run(options, pool)
            return 0
        with Pool(options.threads) as own:
            run(options, own)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
