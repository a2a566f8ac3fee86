"""`flashbone merge` on the command line."""

import json
import re
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from flashbone.cli import main
from flashbone.merge import verify
from helpers.adapter_folders import blocks_for, listing, tiny_llama, write_adapter


@pytest.fixture
def place(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({f"layers.{n}.q.weight": torch.randn(8, 8) for n in range(3)}, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "adapter", "bone", {"layers.0.q": torch.randn(4, 8)})
    return tmp_path


def _arguments(place) -> list[str]:
    return ["merge", *(str(place / name) for name in ("base", "adapter", "out"))]


def test_the_summary_is_one_line_on_stdout(place, capsys):
    assert main(_arguments(place)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "1 tensors merged (bone), 0 replaced, 2 copied" in lines[0]
    assert str(place / "out") in lines[0]
    assert (place / "out" / "model.safetensors").is_file()


def test_blocks_that_are_zero_are_told(place, capsys):
    """As training leaves the blocks of layers whose output nobody uses."""
    write_adapter(place / "adapter", "bone", {"layers.0.q": torch.randn(4, 8), "layers.1.q": torch.zeros(4, 8)})
    assert main(_arguments(place)) == 0
    summary, untrained = capsys.readouterr().out.splitlines()
    assert "2 tensors merged" in summary
    assert untrained == "1 of the merged tensors are as in the base: their blocks are zero, untrained"


def test_json_is_the_report(place, capsys):
    assert main([*_arguments(place), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == str(place / "out")
    assert (report["variant"], report["merged"], report["copied"]) == ("bone", 1, 2)
    assert report["bytes_written"] == sum(file.stat().st_size for file in (place / "out").iterdir())
    assert report["record"] == json.loads((place / "out" / "merge.json").read_text())


def test_bad_input_is_one_line_on_stderr_and_exit_code_1(place, capsys):
    write_adapter(place / "adapter", "bone", {"layers.9.q": torch.randn(4, 8)})
    before = listing(place)
    assert main(_arguments(place)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("flashbone merge: error: ")
    assert "layers.9.q.weight: not in the base" in captured.err
    assert listing(place) == before


def test_a_wrong_command_line_is_exit_code_2(place, capsys):
    assert main(["merge", "only-one"]) == 2
    assert main([*_arguments(place), "--unknown"]) == 2
    assert "usage: flashbone merge" in capsys.readouterr().err


def test_help_names_the_arguments(capsys):
    assert main(["merge", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("BASE", "ADAPTER", "OUT", "--json"))


def test_a_hub_id_is_taken_from_the_cache(place, capsys, monkeypatch):
    asked = []

    def download(repo: str, local_files_only: bool, ignore_patterns: list[str]) -> str:
        asked.append((repo, local_files_only))
        return str(place / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main(["merge", "some-org/some-model", str(place / "adapter"), str(place / "out")]) == 0
    assert asked == [("some-org/some-model", True)]


def test_an_unknown_hub_id_is_one_clear_line(place, capsys):
    assert main(["merge", "no-such-org/no-such-model", str(place / "adapter"), str(place / "out")]) == 1
    assert "no-such-org/no-such-model: no such folder, and not found in the hub's cache" in capsys.readouterr().err


def test_what_a_killed_run_left_is_mentioned(place, capsys):
    (place / ".out.x.partial").mkdir()
    assert main(_arguments(place)) == 0
    assert ".out.x.partial is left of a run that was killed" in capsys.readouterr().err


@pytest.mark.slow
def test_merging_imports_neither_peft_nor_transformers(place):
    code = (
        "import sys; from flashbone.cli import main; code = main(sys.argv[1:]);"
        " print([m for m in ('peft', 'transformers') if m in sys.modules]); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code, *_arguments(place)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"


def test_verify_compares_logits_before_anything_appears(tmp_path, capsys, monkeypatch):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    blocks = blocks_for(base, "bat-row", ("q_proj",), 4)
    write_adapter(tmp_path / "adapter", "bat-row", blocks, target_modules=["q_proj"])
    before = listing(tmp_path)
    arguments = [*_arguments(tmp_path), "--verify", "--weights", "0.5"]
    wrong = verify.Verification(8, "float32", 0.5, 0.1, 0.4, 1e-3, ok=False)
    with monkeypatch.context() as patched:
        patched.setattr(verify, "compare_logits", lambda *given: wrong)
        assert main(arguments) == 1
    assert "verification FAILED: outputs differ by 4.0e-1 (limit 1e-3); nothing was written" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"flashbone merge: OK: outputs agree to \S+ \(limit 3e-5\)", captured.err)
    verification = verify.Verification(**json.loads(captured.out)["verification"])
    assert verification == verify.compare_logits(tmp_path / "base", [tmp_path / "adapter"], [0.5], tmp_path / "out")
    assert verification.ok


def test_what_can_never_be_verified_is_refused_before_anything_is_merged(place, capsys, monkeypatch):
    monkeypatch.setattr("flashbone.merge.merge_checkpoint", lambda *given, **options: pytest.fail("it was merged"))
    before = listing(place)
    assert main([*_arguments(place), "--verify"]) == 1
    assert "base: has no config.json, so transformers cannot load it" in capsys.readouterr().err
    torch.save({"emb.weight": torch.ones(2), "blocks.0.att.key.weight": torch.ones(2)}, place / "rwkv.pth")
    assert main(["merge", str(place / "rwkv.pth"), *_arguments(place)[2:], "--verify"]) == 1
    assert "it can be merged, but not verified" in capsys.readouterr().err
    assert listing(place) == [*before, "rwkv.pth"]


@pytest.mark.parametrize(
    "options", [["--weights", "-0.5,1"], ["--weights=-0.5,1"], ["--weights", "-5e-1,1.0"]], ids=" ".join
)
def test_weights_may_begin_with_a_minus(place, capsys, options):
    command, *paths, out = _arguments(place)
    assert main([command, *options, *paths, paths[-1], out, "--json"]) == 0
    assert [adapter["weight"] for adapter in json.loads(capsys.readouterr().out)["record"]["adapters"]] == [-0.5, 1]
