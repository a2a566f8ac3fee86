"""How pages are run, that none is left out, and that links between them lead somewhere."""

import os
import re

import pytest

from flashbone.errors import ConfigError
from helpers.ledger import complaints, is_runnable, pages, runs
from helpers.pages import ROOT, Block, PageRun, blocks, commands, known_extras, make_targets, run_page


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
LATE = "BoneConfig is used before `import flashbone`"
STRAY = "a fence that is not read as one: is it closed, and of three backticks?"


@pytest.fixture
def repository(tmp_path):
    """A documentation of one page with code, which one test runs."""
    for folder in ("docs", "tests/docs", "tests/quantised"):
        (tmp_path / folder).mkdir(parents=True)
    for page in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
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
        ("docs/page.md", "```python\nfrom peft import BoneConfig\nimport flashbone\n```\n", f"docs/page.md:12: {LATE}"),
        ("docs/page.md", "```python\nimport peft\n\nc = peft.BoneConfig()\n```\n", f"docs/page.md:12: {LATE}"),
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


def test_a_page_that_imports_flashbone_first_is_right(repository):
    with (repository / "docs" / "page.md").open("a") as file:
        file.write("```python\nimport flashbone\n```\n\n```python\nfrom peft import BoneConfig\n```\n")
        file.write("```python\nfrom peft import BoneConfig\n```\n")
    (repository / "docs" / "own.md").write_text("```python\nfrom flashbone import BoneConfig\n```\n")
    test = repository / "tests" / "docs" / "test_page.py"
    test.write_text(test.read_text() + '    run_page("docs/own.md")\n')
    assert complaints(repository) == []


RUN = "def test_it(made):\n    run_page('docs/page.md')\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (RUN, 1),
        (RUN.replace("run_page('docs/page.md')", "PageRun('docs/page.md').run()"), 1),
        (RUN.replace("run_page('docs/page.md')", "one = PageRun('docs/page.md')\n    one.run()"), 1),
        (RUN.replace("run_page('docs/page.md')", "PageRun('docs/page.md')"), 0),
        (RUN.replace("run_page('docs/page.md')", "one = PageRun('docs/page.md')\n    one.bash(block)"), 0),
        (RUN.replace("run_page('docs/page.md')", "return run_page"), 0),
        (RUN.replace("test_it", "helper"), 0),
        (RUN.replace("test_it", "helper") + "\n\ndef test_it():\n    helper(1)\n", 1),
        ("@pytest.fixture\n" + RUN.replace("test_it", "ran"), 0),
        ("@pytest.fixture\n" + RUN.replace("test_it", "ran") + "\n\ndef test_it(ran):\n    pass\n", 1),
        ("@pytest.mark.skip\n" + RUN, 0),
        ("@pytest.mark.skip(reason='slow')\n" + RUN, 0),
        ("@pytest.mark.skipif(True, reason='slow')\n" + RUN, 0),
        ("@pytest.mark.skipif(not HERE, reason='not here')\n" + RUN, 1),
        ("@pytest.mark.xfail(reason='slow', run=False)\n" + RUN, 0),
        ("pytestmark = [pytest.mark.skip]\n\n\n" + RUN, 0),
        ("pytest.skip('slow', allow_module_level=True)\n" + RUN, 0),
        (RUN.replace("    run", "    pytest.skip('slow')\n    run"), 0),
        ("class TestIt:\n    def test_it(self):\n        run_page('docs/page.md')\n", 1),
        ("@pytest.mark.skip\nclass TestIt:\n    def test_it(self):\n        run_page('docs/page.md')\n", 0),
    ],
)
def test_a_page_counts_as_run_where_a_test_runs_it(repository, text, count):
    (repository / "tests" / "docs" / "test_page.py").write_text(text)
    assert len(runs(repository).get("docs/page.md", [])) == count


def test_synopses_are_told_from_commands():
    synopses = [
        "flashbone convert ADAPTER OUT --to FORMAT [--json]",
        "flashbone eval MODEL --exact-match|--perplexity FILE",
        "flashbone train CONFIG.yaml [--training.learning_rate 2e-4 ...] [--resume]",
        "python -m benchmarks NAME",
        "make sure that it is so",
        "make BIN",
        "flashbone eval MODEL --exact-match | --perplexity FILE",
        "y = flashbone(x)",
    ]
    assert [line for line in synopses if is_runnable(line)] == []
    runnable = [
        "flashbone merge RWKV.pth rwkv-0.pth merged.pth",
        "OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks step  # FILE",
        'pip install ".[train]"',
        "uv pip install flashbone",
        "python3 -m flashbone train a.yaml",
        "flashbone train a.yaml | tee log",
        "cd x && make demo",
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
    with pytest.raises(AssertionError, match="make BIN"):
        run.bash(Block("bash", "make BIN", 3))
    assert {"demo", "test", "compare-sft"} <= make_targets()
    assert not {"BIN", "PIP", "PYTHON"} & make_targets()
    assert run.commands == []


def test_what_is_installed_is_known(tmp_path):
    run = PageRun(str(tmp_path / "page.md"))
    right = [".", "'.[train]'", "'.[train, quant]'", "'flashbone[all]>=0.1'", "flashbone diffusers", "-U flashbone"]
    for words in right:
        run.bash(Block("bash", f"pip install {words}", 3))
    assert run.commands == ["pip"] * len(right)
    wrong = ["'flashbone[train,nonsense]'", "'flashbone[nonsense]>=0.1'", "'.[train, nonsense]'", "flashbone nonsense"]
    for words in wrong:
        with pytest.raises(AssertionError, match=r"page.md:3: pip install .*nonsense"):
            run.bash(Block("bash", f"pip install {words}", 3))
    assert {"train", "quant"} <= known_extras()


def test_variables_before_a_command_are_set_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", "before")
    monkeypatch.delenv("THERE", raising=False)
    seen = []

    def command(words):
        seen.append((words, os.environ.get("HERE"), os.environ.get("THERE")))

    page = tmp_path / "page.md"
    page.write_text("```bash\nHERE='a b' THERE= vllm serve x=y\nvllm stop\n```\n")
    run = run_page(str(page), elsewhere={"vllm": command})
    assert seen == [(["vllm", "serve", "x=y"], "a b", ""), (["vllm", "stop"], "before", None)]
    assert run.commands == ["vllm", "vllm"]
    with pytest.raises(AssertionError, match=r"no command is one of \['ollama'\]"):
        run_page(str(page), elsewhere={"vllm": command, "ollama": command})


def test_yaml_without_a_name_is_fields_of_a_recipe(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```yaml\nquantization: {bits: 4}\n```\n")
    assert run_page(str(page)).ran == ["yaml"]
    page.write_text("```yaml\nquantisation: {bits: 4}\n```\n")
    with pytest.raises(ConfigError, match="quantisation"):
        run_page(str(page))


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
