"""Fixtures that the folders of tests share; a conftest takes what its folder needs by importing it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """The folder of a tiny language model and its tokenizer."""
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """Nothing touches the user's cache of datasets, here or in processes that a test starts; and no bars."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("datasets")
        patch.setenv("HF_DATASETS_CACHE", str(place))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture
def jsonl(tmp_path) -> Callable[..., Path]:
    """Writes rows (objects, or lines as they are) into a .jsonl file."""

    def write(rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
