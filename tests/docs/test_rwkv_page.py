"""docs/rwkv.md runs as it stands, on small models under the names that it uses, and so do the scripts but for
run_qbone.sh, which needs bitsandbytes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from flashbone.cli import main
from flashbone.train.recipe import RwkvSettings, load_recipe
from helpers.comparison import close
from helpers.pages import ROOT, run_page
from helpers.rwkv import write_rwkv
from helpers.stand_ins import write_rows

PAGE = (ROOT / "docs" / "rwkv.md").read_text()
SCRIPTS = ROOT / "examples" / "rwkv"
SMALL = ["--data.path", "rows.jsonl", "--data.eval", "2", "--training.max_steps", "1", "--training.bf16", "false"]
SMALL += ["--training.per_device_train_batch_size", "2"]
pytest.importorskip("rwkv", reason="rwkv, which brings the vocabulary, is not installed; `make test` does it")


def write_questions(file: Path) -> None:
    """Rows as in MetaMathQA."""
    write_rows(file, ({"query": f"What is {i} + {i}?", "response": f"It is {2 * i}."} for i in range(12)))


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(place):
    write_rwkv(place / "RWKV.pth", 7, vocabulary=65536)
    run = run_page("docs/rwkv.md")
    assert run.ran == ["python"] * 3
    assert run.names["logits"].shape[-1] == 65536
    assert Path("state.pth").is_file()
    assert torch.load("merged.pth", weights_only=True).keys() == torch.load("RWKV.pth", weights_only=True).keys()


def test_the_table_of_settings_is_the_code_s():
    table = PAGE[PAGE.index("| field | default") : PAGE.index("- **Data**")]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in table.splitlines()[2:] if line.strip()]
    settings = RwkvSettings()
    assert [name for name, _ in rows] == list(vars(settings))
    shown = {None: ("none", "the package's"), True: ("true",), False: ("false",), 2.0: ("2.0",)}
    for name, default in rows:
        value = getattr(settings, name)
        assert default in (("[]",) if value == [] else shown[value]), name


def test_snippets_of_recipes_in_the_comparison_are_fields_that_exist(tmp_path):
    rows = [line.split("|") for line in PAGE[PAGE.index("| there | here |") :].splitlines() if line.startswith("| `")]
    here = [cell for row in rows for cell in re.findall(r"`([^`]+)`", row[-2]) if ":" in cell]
    assert len(here) > 10
    for snippet in here:
        fields = yaml.safe_load(snippet if not snippet.startswith("{") else f"quantization: {snippet}")
        fields = {"adapter": fields} if "variant" in fields else fields
        file = tmp_path / "recipe.yaml"
        base = {"model": "M.pth", "output": "out"}
        file.write_text(yaml.safe_dump({**base, "data": {"path": "X"}, **fields}))
        load_recipe(file)


@pytest.mark.slow
def test_the_scripts_train_and_merge_a_small_model(tmp_path, monkeypatch):
    base = write_rwkv(tmp_path / "base.pth", 7, vocabulary=260, layers=1)
    vocabulary = tmp_path / "bytes.txt"
    vocabulary.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    write_questions(tmp_path / "rows.jsonl")
    common = ["--model", str(base), "--rwkv.vocabulary", str(vocabulary), *SMALL]
    commands = tmp_path / "commands.txt"
    (tmp_path / "flashbone").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {commands}\n')
    (tmp_path / "flashbone").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        """The script in a shell; the command that it gives runs here, which saves a start of Python."""
        subprocess.run(["bash", str(SCRIPTS / script), *arguments], env=environment, check=True)
        assert main(commands.read_text().splitlines()) == 0

    for script, variant in (("run_bone.sh", "bone"), ("run_bat.sh", "bat-row")):
        run(script, *common, "--output", variant)
        assert json.loads((tmp_path / variant / "summary.json").read_text())["variant"] == variant
    run("merge_bone.sh", str(base), "bat-row/adapter", "out.pth")
    merged, ours = (torch.load(tmp_path / p, weights_only=True) for p in ("out.pth", "bat-row/merged.pth"))
    assert merged.keys() == ours.keys()
    assert all(close(merged[name], ours[name]) for name in ours)
