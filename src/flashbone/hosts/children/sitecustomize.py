"""Gives PEFT its BONE method in every Python process below `flashbone run`, which puts this folder on PYTHONPATH.

Tools such as ms-swift, axolotl and TRL train in processes that they start. A `sitecustomize` that this one hides runs
after it.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import flashbone as flashbone

_HERE = Path(__file__).parent
_spec = PathFinder.find_spec("sitecustomize", [place for place in sys.path if Path(place) != _HERE])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))
