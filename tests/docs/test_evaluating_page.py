"""The Python of docs/evaluating.md runs as it stands, on a tiny model, and the page names every option."""

import re
from pathlib import Path

import yaml

from flashbone.cli.eval import make_parser
from helpers.tiny_llama import write_tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text()


def test_python_blocks_of_the_page_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "MODEL")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/evaluating.md", "exec"), names)
    assert [one.wanted for one in names["results"]] == ["3", "2"]
    assert set(names["figures"]) == {"loss (nats per token)", "perplexity", "bits per byte"}


def test_every_option_is_on_the_page_and_no_other():
    options = {option for action in make_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert {f"--{name}" for name in re.findall(r"`--([a-z-]+)", PAGE)} == options


def test_commands_of_the_page_parse():
    commands = re.findall(r"^    (?:\$ )?flashbone eval (?!MODEL \[)(.*)$", PAGE, re.M)
    assert len(commands) >= 7
    for command in commands:
        make_parser().parse_args(re.findall(r"'[^']*'|\S+", command))


def test_the_task_file_of_the_page_is_yaml():
    text = PAGE[PAGE.index("    task: my_task") : PAGE.index("Every metric")]
    task = yaml.safe_load("\n".join(line[4:] for line in text.splitlines()))
    assert task["output_type"] == "multiple_choice"
    assert task["doc_to_text"] == "{{question}}"
