"""CITATION.cff: valid by the rules of the format's version 1.2.0 that apply to it, and about this project."""

from pathlib import Path

import pytest
import tomllib
import yaml

ROOT = Path(__file__).parents[2]
REQUIRED = {"authors", "cff-version", "message", "title"}
ALLOWED = REQUIRED | {
    *("abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url"),
    *("preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url"),
}  # all but `version`, which is written in one place


@pytest.fixture(scope="module")
def citation():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def papers(citation):
    return [citation["preferred-citation"], *citation["references"]]


def test_it_has_the_keys_that_the_format_asks_for_and_no_others(citation):
    assert set(citation) >= REQUIRED
    assert set(citation) <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"


def test_every_paper_has_type_title_and_authors_with_both_names(citation):
    for paper in papers(citation):
        assert paper["type"] == "article"
        assert isinstance(paper["title"], str)
        assert isinstance(paper["year"], int)
        assert paper["authors"]
        for author in paper["authors"]:
            assert set(author) == {"family-names", "given-names"}
            assert all(isinstance(name, str) and name for name in author.values())


def test_the_papers_are_those_that_the_readme_names(citation):
    number = "2409.15371"
    assert f"arxiv.org/abs/{number}" in (ROOT / "README.md").read_text(encoding="utf-8")
    for paper in papers(citation):
        assert paper["url"].startswith(f"https://arxiv.org/abs/{number}")
        assert f"arXiv:{number}" in paper["journal"]


def test_name_licence_and_authors_are_those_of_the_package(citation):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["title"] == project["name"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
