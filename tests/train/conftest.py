"""A tiny model and small data files for the tests of training; nothing touches the user's caches."""

import json
import os
from pathlib import Path

import pytest

# Read once, when datasets is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    from helpers.tiny_llama import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (objects, or lines as they are) into a .jsonl file."""

    def write(rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
