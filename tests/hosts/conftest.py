"""A tiny Llama with its tokenizer for the hosts; nothing touches the user's caches, and no progress bars."""

import pytest

from helpers.fixtures import _own_cache, llama

__all__ = ["_own_cache", "llama"]


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
