"""Real tasks of lm-evaluation-harness on a tiny model; `make test-all` brings the harness."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from flashbone.errors import ConfigError
from flashbone.evaluate.harness import Tasks, evaluations_of
from flashbone.evaluate.loading import load_language_model
from flashbone.evaluate.run import Request, evaluate
from helpers.rwkv import write_rwkv

HAS_HARNESS = find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HAS_HARNESS, reason="lm-evaluation-harness is not installed; `make test-all` brings it"
)

QUESTIONS = [
    {"question": "where was the cat ?", "choices": ["a mat", "under tree", "red mat"], "answer": 1},
    {"question": "what did the dog do ?", "choices": ["it ran", "a mat", "it sat"], "answer": 2},
    {"question": "was it big ?", "choices": ["no no", "yes big", "small cat"], "answer": 1},
    {"question": "who sat ?", "choices": ["blue cat", "the dog", "tree tree"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks over files of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/pets.jsonl}}}}\ntest_split: test\n"
    (folder / "pets.yaml").write_text(
        f"task: pets\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: answer\ndoc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "pets_said.yaml").write_text(
        f"task: pets_said\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


def best_choices(model, tokenizer):
    """For each question the choice of the highest log-likelihood, by one plain call a choice."""
    found = []
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            before = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0].log_softmax(-1)
            sums.append(sum(float(scores[place - 1, ids[0, place]]) for place in range(before, ids.shape[1])))
        found.append(sums.index(max(sums)))
    return found


@pytest.mark.beside
@needs_harness
def test_accuracy_is_that_of_plain_log_likelihoods_with_and_without_an_adapter(llama, tasks, tmp_path):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from flashbone import BoneConfig

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), BoneConfig(r=8, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "bone_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "a")
    shares = []
    for adapter, merge in ((None, False), (tmp_path / "a", False), (tmp_path / "a", True)):
        request = Request(str(llama), adapter, merge, tasks=("pets",), include_path=tasks, batch_size=3)
        (found,) = evaluate(request).evaluations
        best = best_choices(*load_language_model(str(llama), adapter, torch.float32, "cpu"))
        want = sum(choice == row["answer"] for choice, row in zip(best, QUESTIONS, strict=True)) / 4
        acc = {one.name: one for one in found.figures}["acc"]
        assert (found.of, found.rows, acc.value) == ("pets", 4, want)
        stderr = math.sqrt(want * (1 - want) / 3)  # of a mean of 4
        assert acc.low == pytest.approx(max(0, want - 1.95996 * stderr), abs=1e-4)
        assert acc.high == pytest.approx(min(1, want + 1.95996 * stderr), abs=1e-4)
        shares.append((want, tuple(best)))
    assert shares[0] != shares[1] == shares[2], "the adapter has to change a choice to be seen"


@pytest.mark.beside
@needs_harness
def test_an_rwkv_model_runs_tasks_too(tasks, tmp_path):
    base = write_rwkv(tmp_path / "base.pth", 7, vocabulary=260, layers=2)
    vocabulary = tmp_path / "bytes.txt"
    vocabulary.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    request = Request(str(base), tasks=("pets", "pets_said"), include_path=tasks, vocabulary=str(vocabulary))
    found = evaluate(request).evaluations
    best = best_choices(*load_language_model(str(base), None, torch.float32, "cpu", vocabulary=str(vocabulary)))
    acc = {one.of: one.figures[0] for one in found}["pets"]
    assert acc.name == "acc"
    assert acc.value == sum(choice == row["answer"] for choice, row in zip(best, QUESTIONS, strict=True)) / 4


@pytest.mark.beside
@needs_harness
def test_the_command_prints_nothing_but_json_on_stdout(llama, tasks, tmp_path):
    command = [sys.executable, "-m", "flashbone", "eval", str(llama), "--tasks", "pets,pets_said", "--json"]
    done = subprocess.run(
        [*command, "--include-path", str(tasks), "--limit", "2", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [one["of"] for one in json.loads(done.stdout)["evaluations"]] == ["pets", "pets_said"]
    assert (tmp_path / "out" / "results.json").read_text() == done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.beside
@needs_harness
def test_generation_tasks_run_and_limits_and_examples_are_passed_on(model, tokenizer, tasks):
    loaded = Tasks(["pets_said", "pets"], tasks)
    said, chosen = sorted(
        loaded.run(model, tokenizer, limit=2, num_fewshot=1, batch_size=2), key=lambda one: one.of, reverse=True
    )
    assert (said.of, said.rows, said.figures[0].name) == ("pets_said", 2, "exact_match")
    assert (chosen.rows, chosen.details["num_fewshot"]) == (2, 1)


@pytest.mark.beside
@needs_harness
def test_unknown_tasks_and_folders_are_one_line(tasks, tmp_path):
    with pytest.raises(ConfigError, match=r"no task 'petz'; did you mean pets"):
        Tasks(["petz"], tasks)
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        Tasks(["pets"], tmp_path / "nowhere")


@pytest.mark.skipif(HAS_HARNESS, reason="the harness is installed")
def test_without_the_harness_the_command_to_install_it_is_named():
    with pytest.raises(ConfigError, match=r"pip install 'flashbone\[eval\]'"):
        Tasks(["arc_easy"])


def test_groups_metrics_and_filters_become_figures():
    found = evaluations_of(
        {
            "results": {
                "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.1},
                "one": {"exact_match,strict": 0.99, "exact_match_stderr,strict": 0.02, "alias": "one"},
                "two": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A", "note,none": "text"},
                "empty": {"alias": "empty"},
                "all": {"acc,none": 1.0, "acc_stderr,none": 0.0},
            },
            "n-samples": {
                "one": {"original": 9, "effective": 5},
                "two": {"original": 7, "effective": 7},
                "all": {"effective": 20},
            },
            "group_subtasks": {"group": ["one", "two"]},
        }
    )
    group, one, two, every = found
    assert (every.figures[0].low, every.figures[0].high) == (pytest.approx(0.8389, abs=1e-4), 1.0), "as Wilson has it"
    assert (group.rows, one.rows, two.rows) == (12, 5, 7)
    assert one.figures[0].name == "exact_match (strict)"
    assert (one.figures[0].low, one.figures[0].high) == (pytest.approx(0.9508, abs=1e-4), 1.0)
    assert [(f.name, f.value, f.low) for f in two.figures] == [("word_perplexity", 12.0, None)]
