"""A tiny model for the tests of evaluation, which learns nothing, and small data files."""

import pytest

from helpers.fixtures import _own_cache, jsonl, llama

__all__ = ["_own_cache", "jsonl", "llama"]


@pytest.fixture(scope="session")
def model(llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture(scope="session")
def tokenizer(llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)
