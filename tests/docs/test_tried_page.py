"""The log of what did not work: what missed its target is in it as it was measured, and what it names exists."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
ROOT = DOCS.parent
PAGE = (DOCS / "tried.md").read_text()
WORDS = " ".join(PAGE.split())  # without the ends of lines


def test_every_target_that_was_missed_is_on_the_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.rows import RESULTS, read
    from benchmarks.tables.targets import outcomes

    rows = [row for file in RESULTS.glob("*.jsonl") for row in read(file)]
    missed = {found.target.claim: f"{found.median:.3f}" for found in outcomes(rows) if not found.met}
    assert len(missed) >= 5
    assert {name: ratio for name, ratio in missed.items() if not re.search(rf"\b{re.escape(ratio)}\b", WORDS)} == {}


def test_the_comparisons_say_what_results_says_of_the_claims():
    text, results = ((DOCS / name).read_text() for name in ("comparing.md", "results.md"))
    leads = re.findall(r"^Leads over LoRA in .*", text, re.M)
    verdicts = re.findall(r"Bone(?: \([a-z-]+\))? (tied|better|worse), ", " ".join(leads))
    assert len(verdicts) >= 7
    assert set(verdicts) == {"tied"}
    for figure in re.findall(r"\d\d\.\d%|2\.6\d{3}", results.partition("`bat` beats")[2].partition("\n")[0]):
        assert re.search(rf"\| {figure.replace('%', ' %')} ", text), figure


def test_files_and_targets_that_the_page_names_exist():
    paths = [path for path in re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", PAGE) if not path.endswith(".jsonl")]
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
    targets = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M)
    known = {name for line in targets for name in line.split()}
    assert set(re.findall(r"`make ([\w-]+)`", PAGE)) <= known


def anchors(page: str) -> set[str]:
    """What links may point at: the headings as GitHub and mkdocs spell them."""
    heads = re.findall(r"^#+ (.+)$", (DOCS / page).read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [path.name for path in DOCS.glob("*.md")])
def test_links_into_pages_find_their_heading(page):
    links = re.findall(r"\]\(([\w.-]+\.md)#([\w-]+)\)", (DOCS / page).read_text())
    assert [(to, anchor) for to, anchor in links if anchor not in anchors(to)] == []


def test_an_entry_is_short_and_says_at_once_what_was_tried():
    for section in PAGE.split("\n## ")[1:]:
        name, *entries = section.strip().split("\n\n")
        assert entries, name
        for entry in entries:
            assert re.match(r"\*\*.{8,120}?\*\*", entry), entry
            assert entry.count("\n") < 4, entry
