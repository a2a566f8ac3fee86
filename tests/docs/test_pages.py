"""Every page of the documentation whose code is not run by a test of its own runs here; and no page is left out."""

import re
from pathlib import Path

import pytest

from helpers.pages import ROOT, Block, PageRun, commands, make_targets

HERE = Path(__file__).parent


def pages() -> list[str]:
    """The README and all Markdown below docs/, from the root of the repository."""
    return ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", pages())
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_commands_are_split_as_a_shell_would():
    text = "flashbone train c.yaml \\\n    --resume  # go on\n\n# nothing\nA=1 make demo\n"
    assert commands(text) == [["flashbone", "train", "c.yaml", "--resume"], ["A=1", "make", "demo"]]


def test_a_page_that_fails_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = PageRun("README.md")
    with pytest.raises(AssertionError, match=r"README.md:3: flashbone merge nowhere"):
        run.bash(Block("bash", "flashbone merge nowhere", 3))
    with pytest.raises(AssertionError, match="nothing runs this"):
        run.bash(Block("bash", "ollama create x", 3))
    with pytest.raises(AssertionError, match="make nonsense"):
        run.bash(Block("bash", "make nonsense", 3))
    with pytest.raises(ZeroDivisionError):
        run.python(Block("python", "1 / 0", 3))
    assert {"demo", "test", "compare-sft"} <= make_targets()
