"""`flashbone convert` on the command line, and its twin in Python."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import flashbone
from flashbone.cli import main
from helpers.adapter_folders import blocks_for, listing, tiny_llama, write_adapter
from helpers.comparison import Promise, same_bits

TARGETS = ("q_proj", "down_proj")


@pytest.fixture
def place(tmp_path):
    """A tiny Llama, a bone adapter and a bat-row adapter of it."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    for variant in ("bone", "bat-row"):
        write_adapter(
            tmp_path / variant, variant, blocks_for(model, variant, TARGETS, 4), r=4, target_modules=[*TARGETS]
        )
    return tmp_path


def _arguments(place, adapter: str, *more: str) -> list[str]:
    return ["convert", str(place / adapter), str(place / "out"), *more]


def test_the_summary_says_what_was_written(place, capsys):
    assert main(_arguments(place, "bone", "--to", "miss")) == 0
    assert capsys.readouterr().out == f"{place / 'out'}: 4 modules, bone to miss, exact\n"
    assert (place / "out" / "adapter_model.safetensors").is_file()


def test_an_approximation_names_its_errors_the_worst_first(place, capsys):
    base = str(place / "base")
    assert main(_arguments(place, "bat-row", "--to", "lora", "--base", base, "--rank", "6")) == 0
    first, title, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("4 modules, bat-row to lora, rank 6, approximate")
    assert title == "relative error of the delta, the worst of 4 modules first:"
    errors = [float(row.split()[0]) for row in rows]
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 1


def test_json_is_the_report(place, capsys):
    base = str(place / "base")
    assert main(_arguments(place, "bone", "--to", "lora", "--base", base, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"], report["format"], report["variant"]) == ("peft", "lora", "bone")
    assert (report["rank"], report["exact"], report["errors"]) == (4, True, [])
    assert sorted(report["files"]) == listing(place / "out")


def test_the_command_and_python_write_the_same_tensors(place):
    assert main(_arguments(place, "bone", "--to", "miss")) == 0
    report = flashbone.convert(place / "bone", place / "twin", "miss")
    assert report.exact
    got, want = (load_file(place / name / "adapter_model.safetensors") for name in ("out", "twin"))
    assert got.keys() == want.keys()
    assert all(same_bits(got[key], tensor, Promise.STORED) for key, tensor in want.items())


def test_an_engine_says_how_it_is_started(place, capsys):
    assert main(_arguments(place, "bone", "--for", "vllm", "--base", str(place / "base"))) == 0
    out = capsys.readouterr().out
    assert "bone to lora, rank 8, exact" in out
    assert "--max-lora-rank 8" in out
    assert str(place / "out") in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "to: got 'onnx', wanted one of peft, miss, lora, rwkv-peft, gguf"),
        (["--for", "tensorrt"], "'tensorrt'"),
        (["--to", "miss", "--for", "vllm"], "vllm takes lora, not miss"),
        (["--to", "miss", "--rank", "4"], "rank and error are for LoRAs, and miss is not one"),
        (["--to", "lora"], "a LoRA needs the sizes of the base's layers"),
    ],
)
def test_contradictions_are_one_line_and_nothing_is_written(place, capsys, arguments, message):
    before = listing(place)
    assert main(_arguments(place, "bone", *arguments)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("flashbone convert: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert listing(place) == before


@pytest.mark.parametrize("arguments", [[], ["--to"], ["--to", "miss", "--unknown"], ["--to", "lora", "--rank", "many"]])
def test_a_wrong_command_line_is_exit_code_2(place, capsys, arguments):
    assert main(_arguments(place, "bone", *arguments)) == 2
    assert "usage: flashbone convert" in capsys.readouterr().err
    assert not (place / "out").exists()


@pytest.mark.slow
def test_converting_imports_neither_peft_nor_transformers(place):
    code = (
        "import sys; from flashbone.cli import main; code = main(sys.argv[1:]);"
        " print([m for m in ('peft', 'transformers') if m in sys.modules]); sys.exit(code)"
    )
    arguments = _arguments(place, "bone", "--to", "lora", "--base", str(place / "base"))
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
