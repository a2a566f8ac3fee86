"""A tiny model and small data files for the tests of training; nothing touches the user's caches."""

import pytest

from helpers.fixtures import _own_cache, jsonl, llama
from helpers.tiny_llama import questions

__all__ = ["_own_cache", "jsonl", "llama"]


@pytest.fixture
def questions_file(jsonl):
    return jsonl(questions(80))
