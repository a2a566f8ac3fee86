"""Pages run in a folder of their own; what they make `datasets` cache is not the user's."""

import logging
from pathlib import Path

import pytest

from helpers.fixtures import _own_cache

__all__ = ["_own_cache"]


@pytest.fixture(autouse=True)
def _own_notices():
    """The commands' notices go to the stderr of the test that runs them."""
    yield
    logging.getLogger("flashbone").handlers.clear()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder in which a page runs: the current one, and empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
