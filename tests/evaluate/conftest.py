"""A tiny model for the tests of evaluation, which learns nothing, and small data files."""

import json
from pathlib import Path

import pytest

from helpers.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def model(llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture(scope="session")
def tokenizer(llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (objects, or lines as they are) into a .jsonl file."""

    def write(rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
