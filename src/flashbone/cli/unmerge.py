"""`flashbone unmerge MERGED ADAPTER... OUT`; it shares all of its parsing with `flashbone merge`."""

from flashbone.cli.merge import make_unmerge_parser as make_parser
from flashbone.cli.merge import run_unmerge as run

__all__ = ["make_parser", "run"]
