"""The page on comparisons: it runs, and its tables are what the kept results say."""

import re
from pathlib import Path

import pytest

from helpers.pages import run_page
from helpers.stand_ins import write_rows
from helpers.tiny_llama import questions, write_tiny_llama

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparing.md"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    from examples.compare import tables

    return tables


@pytest.mark.slow  # resamples every kept comparison
def test_the_pages_are_what_the_kept_results_say(tables):
    assert tables.main(["--check"]) == 0, "run python -m examples.compare.tables"
    assert len(list((ROOT / tables.RESULTS).glob("*/results.jsonl"))) == 3


@pytest.mark.slow
def test_a_changed_result_would_show(tables, tmp_path):
    text = PAGE.read_text()
    name = re.search(r"\| Bone( \(tied\))? \|", text)
    changed = text.replace(name[0], "| bone |", 1)
    assert changed != text
    assert tables.filled(changed, tables.measured(tables.RESULTS)) == text


SMALL = {
    "budget: {method: bone, r: 64}": "budget: {method: bone, r: 8}",
    "[3.0e-4, 1.0e-3, 3.0e-3]": "[1.0e-3]",
    "max_steps: 200,": "max_steps: 2, use_cpu: true, disable_tqdm: true,",
}


@pytest.mark.slow
def test_the_comparison_of_the_page_runs(place, capsys):
    write_tiny_llama(place / ".cache/demo/smollm2")
    for name, count in (("train", 40), ("test", 8)):
        rows = enumerate(questions(count))
        write_rows(f"{name}.jsonl", ({**row, "prompt": f"{row['prompt']} {'.' * i}"} for i, row in rows))
    run = run_page("docs/comparing.md", replaced=SMALL)
    assert run.ran == ["bash", "yaml", "bash", "python"]
    assert "| Bone " in run.names["table"]
    assert (place / "report" / "report.html").exists()
    assert len(list((place / "runs" / "compare" / "runs").iterdir())) == 4
    assert "12 runs; budget" in capsys.readouterr().out  # four methods, one rate, three seeds
