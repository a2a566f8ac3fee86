"""Bits are compared only where they are promised: each comparison of bits names its promise."""

import ast
from pathlib import Path

import pytest
import torch

from helpers.comparison import Promise, same_bits

TESTS = Path(__file__).parent
HELPER = TESTS / "helpers" / "comparison.py"


def bare(tree: ast.AST) -> list[int]:
    """The lines of `torch.equal` and `.equal` that are not negated: that two tensors differ needs no promise."""
    negated = {
        node.operand for node in ast.walk(tree) if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    }
    excused = {node.func for node in negated if isinstance(node, ast.Call)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "equal"]
    return sorted(node.lineno for node in nodes if node not in excused)


def test_every_comparison_of_bits_names_its_promise():
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("*.py")) if path != HELPER}
    lines = {str(path.relative_to(TESTS)): bare(ast.parse(text)) for path, text in texts.items() if ".equal" in text}
    assert lines
    assert not {name: numbers for name, numbers in lines.items() if numbers}


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("assert torch.equal(a, b)", 1),
        ("assert all(torch.equal(a, b) for a, b in pairs)", 1),
        ("assert all(map(torch.equal, first, second))", 1),
        ("assert a.equal(b)", 1),
        ("assert not torch.equal(a, b)", 0),
        ("assert not a.equal(b)", 0),
        ("assert same_bits(a, b, Promise.STORED)", 0),
    ],
)
def test_a_bare_comparison_is_seen(code, count):
    assert len(bare(ast.parse(code))) == count


def test_other_values_shapes_and_dtypes_are_not_the_same_bits():
    ones = torch.ones(2)
    assert same_bits(ones, torch.ones(2), Promise.EXACT)
    assert not same_bits(ones, torch.ones(3), Promise.EXACT)
    assert not same_bits(ones, torch.ones(2, dtype=torch.float64), Promise.EXACT)
    assert not same_bits(ones, torch.tensor([1.0, 1.0 + 2**-23]), Promise.EXACT)
