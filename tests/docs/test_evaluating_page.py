"""docs/evaluating.md runs on tiny models under the names that it uses, and names every option."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from flashbone.cli.eval import make_parser
from helpers.pages import ROOT, PageRun, blocks
from helpers.stand_ins import link_examples, write_adapter_of, write_rows, write_tiny_bert
from helpers.tiny_llama import questions, write_tiny_llama

PAGE = (ROOT / "docs" / "evaluating.md").read_text()
HARNESS = ROOT / ".venv" / "eval"  # lm-evaluation-harness lies beside the environment
SMALL = {
    "--max-new-tokens 160": "--max-new-tokens 4",
    "gsm8k/test.jsonl --prompt alpaca": "gsm8k/test.jsonl --prompt alpaca --max-new-tokens 4",
    "--no-chat-template\n": "--no-chat-template --max-new-tokens 4\n",
    "--output runs/news": "--output runs/news --training.max_steps 2 --training.use_cpu true",
}


class Followed(PageRun):
    """Tasks of the harness run in a process of their own, where it is; those whose data are on the hub are parsed."""

    def command(self, words: list[str], where: str) -> None:
        if "--tasks" not in words:
            return super().command(words, where)
        given = make_parser().parse_args(words[2:])
        if given.include_path is None or not (HARNESS / "lm_eval").is_dir():
            assert given.tasks, where
            return None
        environment = os.environ | {"PYTHONPATH": str(HARNESS), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "flashbone", *words[1:], "--device", "cpu", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (evaluation,) = json.loads(done.stdout)["evaluations"]
        self.names["my_task"] = {figure["name"] for figure in evaluation["figures"]}
        return None


def prepare() -> None:
    """The models and files that the page names."""
    write_tiny_llama(base := ".cache/demo/smollm2")
    write_adapter_of(base, "runs/math/adapter")
    rows = questions(8)
    asked = [row["prompt"] for row in rows]
    write_rows("gsm8k/test.jsonl", ({"question": text, "answer": f"so #### {i}"} for i, text in enumerate(asked)))
    write_rows("meta.jsonl", ({"query": text, "response": f"The answer is: {i}"} for i, text in enumerate(asked)))
    write_rows(".cache/demo/chat/test.jsonl", rows)
    choices = {"choices": ["a mat", "under tree"]}
    write_rows("my_tasks/questions.jsonl", ({"question": q, "answer": i % 2, **choices} for i, q in enumerate(asked)))
    write_tiny_bert(".cache/classification/minilm")
    news = [{"text": row["prompt"], "label": row["completion"].split()[2]} for row in questions(24)]
    for name in ("train", "test"):
        write_rows(f".cache/classification/news/{name}.jsonl", news)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(place, capsys):
    prepare()
    link_examples(place)
    run = Followed("docs/evaluating.md", replaced=SMALL).run()
    assert set(run.names["figures"]) == {"loss (nats per token)", "perplexity", "bits per byte"}
    if (HARNESS / "lm_eval").is_dir():
        assert run.names["my_task"] == {"acc", "acc_norm"}
    said = capsys.readouterr().out
    for shown in [block.text for block in blocks("docs/evaluating.md") if "┏" in block.text]:
        figures = re.findall(r"^│ .*?│ .*?│ (.*?) +│", shown, re.M)
        assert figures
        assert all(f" {figure} " in said for figure in figures)
    (line,) = [json.loads(b.text) for b in blocks("docs/evaluating.md") if b.text.startswith("{")]
    assert line.keys() == json.loads((place / "results/math/answers.jsonl").read_text().splitlines()[0]).keys()
    summary = json.loads((place / "runs/news/summary.json").read_text())
    assert f"{summary['eval_accuracy_after']:.4f}" in said.rpartition("accuracy")[2]


def test_every_option_is_on_the_page_and_no_other():
    options = {option for action in make_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert {f"--{name}" for name in re.findall(r"`--([a-z-]+)", PAGE)} == options


def test_the_commands_of_the_page_use_every_kind_of_measure():
    shell = "".join(block.text for block in blocks("docs/evaluating.md") if block.language == "bash")
    assert len(re.findall("^flashbone eval ", shell, re.M)) >= 7
    kinds = ("--exact-match", "--tasks", "--perplexity", "--classification")
    assert [kind for kind in kinds if f" {kind} " not in shell] == []


def test_the_task_file_of_the_page_is_one_of_choices():
    (task,) = [yaml.safe_load(block.text) for block in blocks("docs/evaluating.md") if block.language == "yaml"]
    assert task["output_type"] == "multiple_choice"
    assert task["doc_to_text"] == "{{question}}"
