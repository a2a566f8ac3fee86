"""The page on comparisons: its Python runs, and its tables are what the kept results say."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparing.md"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    from examples.compare import tables

    return tables


def test_the_tables_are_what_the_kept_results_say(tables):
    assert tables.main(["--check"]) == 0
    assert len(list((ROOT / tables.RESULTS).glob("*/results.jsonl"))) == 2


def test_a_changed_result_would_show(tables, tmp_path):
    text = PAGE.read_text()
    name = re.search(r"\| Bone( \(tied\))? \|", text)
    changed = text.replace(name[0], "| bone |", 1)
    assert changed != text
    assert tables.filled(changed, tables.RESULTS) == text


def test_the_python_and_the_yaml_of_the_page_run(tmp_path, monkeypatch):
    from helpers.tiny_llama import questions, write_tiny_llama

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = PAGE.read_text()
    config = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    write_tiny_llama(tmp_path / "llama")
    for name, count in (("train", 40), ("test", 8)):
        rows = [
            f'{{"prompt": "{row["prompt"]} {"." * i}", "completion": "{row["completion"]}"}}'
            for i, row in enumerate(questions(count))
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    config |= {"model": str(tmp_path / "llama"), "learning_rates": [1e-3], "budget": {"method": "bone", "r": 8}}
    config["training"] |= {"max_steps": 2, "use_cpu": True, "disable_tqdm": True}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, "comparing.md", "exec"), names)
    assert "| Bone " in names["table"]
    assert (tmp_path / "report" / "report.html").exists()
