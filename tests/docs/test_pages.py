"""How pages are run, that none is left out, and that links between them lead somewhere."""

import re

import pytest

from helpers.ledger import complaints, is_runnable, pages, runs
from helpers.pages import ROOT, Block, PageRun, blocks, commands, known_extras, make_targets


@pytest.mark.parametrize("page", pages())
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_every_page_with_code_is_run_by_one_test_and_every_command_is_code():
    assert complaints() == []


PAGE = """# A page

```bash
flashbone inspect here
```

    y = x + 1

```text
flashbone inspect TARGET [--json]
```
"""
NONE = "has code, and is run by 0 tests: none"
UNRUN = "nothing runs this"
STRAY = "a fence that is not read as one: is it closed, and of three backticks?"


@pytest.fixture
def repository(tmp_path):
    """A documentation of one page with code, which one test runs."""
    for folder in ("docs", "tests/docs", "tests/quantised"):
        (tmp_path / folder).mkdir(parents=True)
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        (tmp_path / page).write_text("# Nothing to run\n")
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    (tmp_path / "tests" / "docs" / "test_page.py").write_text('def test_it():\n    run_page("docs/page.md")\n')
    assert complaints(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("page", "added", "said"),
    [
        ("README.md", "```python\n1 / 0\n```\n", f"README.md: {NONE}"),
        ("docs/new.md", "1. In a list\n\n   ```yaml\n   a: 1\n   ```\n", f"docs/new.md: {NONE}"),
        ("docs/page.md", "\n    $ flashbone merge a b c\n", f"docs/page.md:13: {UNRUN}: $ flashbone merge a b c"),
        ("docs/page.md", "\n    x = y\n    make demo\n", f"docs/page.md:13: {UNRUN}: make demo"),
        ("docs/page.md", "```text\npip install '.[x]'\n```\n", f"docs/page.md:12: {UNRUN}: pip install '.[x]'"),
        ("docs/page.md", "\n    from flashbone import a\n", f"docs/page.md:13: {UNRUN}: from flashbone import a"),
        ("docs/page.md", "```sh\nls\n```\n", "docs/page.md:12: no such language here: sh"),
        ("docs/page.md", "```\nls\n```\n", "docs/page.md:12: no such language here: none"),
        ("docs/page.md", "```python\n1 / 0\n", f"docs/page.md:12: {STRAY}"),
        ("docs/page.md", "~~~\n", f"docs/page.md:12: {STRAY}"),
    ],
)
def test_a_block_that_nothing_runs_is_found(repository, page, added, said):
    with (repository / page).open("a") as file:
        file.write(added)
    assert complaints(repository) == [said]


def test_a_page_that_two_tests_run_or_none_does_is_found(repository):
    test = repository / "tests" / "docs" / "test_page.py"
    own = 'PAGE = "docs/page.md"\n\n\nclass Own(PageRun):\n    pass\n\n\ndef test_own():\n    Own(PAGE).run()\n'
    (repository / "tests" / "quantised" / "test_again.py").write_text(own)
    assert len(runs(repository)["docs/page.md"]) == 2
    assert "is run by 2 tests: tests/docs/test_page.py, tests/quantised/test_again.py" in complaints(repository)[0]
    test.unlink()
    assert complaints(repository) == []
    (repository / "tests" / "quantised" / "test_again.py").write_text(own.replace("Own(PAGE)", "Own(page)"))
    assert complaints(repository) == ["docs/page.md: has code, and is run by 0 tests: none"]


def test_synopses_are_told_from_commands():
    synopses = [
        "flashbone convert ADAPTER OUT --to FORMAT [--json]",
        "flashbone eval MODEL --exact-match|--perplexity FILE",
        "flashbone train CONFIG.yaml [--training.learning_rate 2e-4 ...] [--resume]",
        "python -m benchmarks NAME",
        "make sure that it is so",
        "y = flashbone(x)",
    ]
    assert [line for line in synopses if is_runnable(line)] == []
    runnable = [
        "flashbone merge RWKV.pth rwkv-0.pth merged.pth",
        "OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks step  # FILE",
        'pip install ".[train]"',
        "accelerate launch --config_file a.yaml -m flashbone train c.yaml",
    ]
    assert [line for line in runnable if not is_runnable(line)] == []


def test_commands_are_split_as_a_shell_would():
    text = "flashbone train c.yaml \\\n    --resume  # go on\n\n# nothing\nA=1 make demo\n"
    assert commands(text) == [["flashbone", "train", "c.yaml", "--resume"], ["A=1", "make", "demo"]]


def test_a_page_that_fails_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = PageRun(str(tmp_path / "page.md"))
    with pytest.raises(AssertionError, match=r"page.md:3: flashbone merge nowhere"):
        run.bash(Block("bash", "flashbone merge nowhere", 3))
    with pytest.raises(AssertionError, match="nothing runs this"):
        run.bash(Block("bash", "ollama create x", 3))
    with pytest.raises(AssertionError, match="make nonsense"):
        run.bash(Block("bash", "make nonsense", 3))
    with pytest.raises(ZeroDivisionError):
        run.python(Block("python", "1 / 0", 3))
    assert {"demo", "test", "compare-sft"} <= make_targets()
    with pytest.raises(AssertionError, match=r"page.md:3: pip install .*nonsense"):
        run.bash(Block("bash", 'pip install "flashbone[train,nonsense]"', 3))
    assert {"train", "quant"} <= known_extras()


IN_ORDER = """
```python
steps = 100
```

1. In a list:

   ```json
   # rows/a.jsonl
   {"x": 1}
   ```

```yaml
# b.yaml
a: 2
```

```text
1 / 0
```

```python
from pathlib import Path

found = Path("b.yaml").read_text()
```
"""


def test_a_page_is_run_in_its_order_with_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(IN_ORDER)
    run = PageRun(str(page), replaced={"100": "1"}).run()
    assert run.ran == ["python", "json", "yaml", "python"]
    assert [block.line for block in blocks(str(page))] == [2, 8, 13, 18, 22]
    assert (run.names["steps"], run.names["found"]) == (1, "# b.yaml\na: 2\n")
    assert (tmp_path / "rows" / "a.jsonl").read_text() == '{"x": 1}\n'
    with pytest.raises(AssertionError, match="nothing to replace"):
        PageRun(str(page), replaced={"200": "1"}).run()
