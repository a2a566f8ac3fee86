"""`flashbone compare` as a user calls it, and the configurations in examples/compare."""

import json
from pathlib import Path

import pytest
import yaml

from flashbone.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "compare").glob("*.yaml"))


@pytest.fixture
def small(config, tmp_path):
    return config(methods=["bone", "full"], seeds=[0], learning_rates=[1e-3], output=str(tmp_path / "out"))


@pytest.mark.slow
def test_a_comparison_prints_its_verdict_and_leaves_its_report(small, tmp_path, capsys):
    assert main(["compare", str(small)]) == 0
    printed = capsys.readouterr()
    assert "Bone" in printed.out
    assert "report.html" in printed.out
    out = tmp_path / "out"
    names = {"results.jsonl", "report.html", "learning_curves.png", "learning_speed.png"}
    names |= {"memory_quality.png", "learning_rates.png"}
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "recipes" / "bone.yaml").exists()
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["compare", str(small), "--report", "--json"]) == 0
    assert (out / "report.html").read_text() == page
    assert [row["kind"] for row in json.loads(capsys.readouterr().out)] == [
        "comparison",
        "method",
        "method",
        "run",
        "run",
    ]


def test_the_plan_shows_the_sizes_and_trains_nothing(small, tmp_path, capsys):
    assert main(["compare", str(small), "--plan", "--json", "--methods", "[bone, lora, vera]"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["runs"] == 3
    sizes = {row["method"]: row["adapter_parameters"] for row in plan["methods"]}
    assert sizes["bone"] == plan["budget"]
    assert abs(sizes["lora"] / sizes["bone"] - 1) < 0.03
    assert not (tmp_path / "out").exists()
    assert main(["compare", str(small), "--plan"]) == 0
    assert "r = 8" in capsys.readouterr().out


def test_a_plan_and_a_report_are_not_asked_for_at_once(small, tmp_path, capsys):
    assert main(["compare", str(small), "--plan", "--report"]) == 2
    assert "--report: not allowed with argument --plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--report"], "no results.jsonl there yet; run the comparison first"),
        (["--sedes", "[1]"], "unknown field: sedes (did you mean seeds?)"),
        (["--model", "./nowhere"], "nowhere"),
        (["--budget", "{method: full}"], "budget: full is a bound"),
        (["--methods", "[lira]"], "got method 'lira'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(small, tmp_path, capsys, args, words):
    assert main(["compare", str(small), *args]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("flashbone compare: error: ")
    assert words in error
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_which_nothing_is_left_says_so(small, tmp_path, capsys):
    assert main(["compare", str(small), "--methods", "[bone]", "--learning_rates", "[1e18]"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("flashbone compare: error: all 1 methods failed; bone: ")
    assert (tmp_path / "out" / "report.html").exists()


def test_an_output_that_is_a_file_is_refused(small, tmp_path, capsys):
    (tmp_path / "file").write_text("here")
    assert main(["compare", str(small), "--output", str(tmp_path / "file")]) == 1
    assert "a file is in the way" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_comparisons_whose_methods_have_sizes(path, tmp_path, monkeypatch):
    """On the configurations of their models, where the models themselves are not there."""
    from transformers import BertConfig, LlamaConfig

    from flashbone.compare.config import load_comparison
    from flashbone.compare.run import plan

    llama_3b = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    minilm = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    minilm, smollm2 = BertConfig(**minilm), LlamaConfig(**smollm2, num_key_value_heads=3, vocab_size=49152)
    shapes = {
        "classification": minilm,
        "topics": minilm,
        "sft": smollm2,
        "gsm8k": smollm2,
        "paper_table": LlamaConfig(),
        "peft_method_comparison": LlamaConfig(**llama_3b, num_key_value_heads=8, head_dim=128),
    }
    shapes[path.stem].save_pretrained(tmp_path)
    comparison = load_comparison(path, ["--model", str(tmp_path), "--methods", "[bone, bat-row, bat-col, lora, miss]"])
    _, methods = plan(comparison)
    sizes = [one.size.adapter_parameters for one in methods if one.size and one.size.matched]
    assert len(sizes) == 5
    assert max(sizes) <= 1.03 * min(sizes)
    listed = yaml.safe_load(path.read_text())
    assert {"bone", "lora", "miss"} <= set(listed["methods"])
    assert len(load_comparison(path).seeds) == 3
