"""Evaluations asked for from Python: requests that contradict themselves, and what is decided for the others."""

from pathlib import Path

import pytest
import torch

from flashbone.errors import ConfigError
from flashbone.evaluate.request import Request, settled

FILE = Path("rows.jsonl")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing to measure: give tasks, exact_match, classification or perplexity"),
        (
            {"classification": FILE, "perplexity": FILE},
            "classification needs a classifier, the other measures a language model",
        ),
        ({"perplexity": FILE, "merge": True}, "merge: there is no adapter to merge"),
        ({"perplexity": FILE, "batch_size": 0}, "batch_size: got 0, wanted 1 or more"),
        ({"perplexity": FILE, "limit": -1}, "limit: got -1, wanted 1 or more"),
        ({"perplexity": FILE, "max_length": 1}, "max_length: got 1, wanted 2 or more"),
        ({"tasks": ("a",), "num_fewshot": -1}, "num_fewshot: got -1, wanted 0 or more"),
        ({"exact_match": FILE, "prompt": "Q:"}, r"prompt: got 'Q:', wanted 'alpaca' or a text with \{question\}"),
        ({"perplexity": FILE, "device": "abacus"}, "device: got 'abacus': "),
        ({"perplexity": FILE, "dtype": "fp8"}, "dtype: got 'fp8', wanted .*bf16"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        settled(Request("model", **fields))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="device: got 'cuda', but torch finds no GPU; use cpu"):
        settled(Request("model", perplexity=FILE, device="cuda"))


def test_a_cpu_measures_in_fp32_unless_another_dtype_is_named():
    request = settled(Request("model", perplexity=FILE, device="cpu"))
    assert (request.device, request.dtype) == ("cpu", "fp32")
    assert settled(Request("model", perplexity=FILE, device="cpu", dtype="bf16")).dtype == "bf16"
