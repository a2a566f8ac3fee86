"""A tiny Llama with its tokenizer for the hosts; nothing touches the user's caches, and no progress bars."""

from pathlib import Path

import pytest

from helpers.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session", autouse=True)
def _quiet(tmp_path_factory):
    import datasets
    import transformers

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
