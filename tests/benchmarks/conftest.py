"""Lets these tests import the benchmarks, which lie beside the package and are no part of it."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
