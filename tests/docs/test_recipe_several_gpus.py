"""docs/recipes/several_gpus.md, from top to bottom; the rehearsal on it in two processes, over gloo."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from socket import socket

import pytest
import yaml
from safetensors.torch import load_file

from flashbone.cli import main
from flashbone.compare.processes import PRELOADED
from flashbone.train.recipe import load_recipe
from helpers.pages import ROOT, PageRun
from helpers.tiny_llama import questions, write_tiny_llama

PAGE = "docs/recipes/several_gpus.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
# A rate for a tiny model, and a schedule that does not depend on where a run was killed.
SMALL = {
    "learning_rate: 2.0e-4": "learning_rate: 1.0e-2\n  logging_steps: 1\n  lr_scheduler_type: constant",
    "save_steps: 0.1": "save_steps: 1\n  save_total_limit: 4",
}


def losses() -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in Path("runs/rehearsal/metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def one_of_two(rank: int, port: int, words: list[str]) -> None:
    """A process as accelerate launches it."""
    rendezvous = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in rendezvous.items()} | {"MASTER_ADDR": "localhost"}
    raise SystemExit(main(words))


class Launched:
    """`accelerate` of the page: what is for CPUs runs, in processes forked from one that has imported everything (they
    are launched for real in tests/distributed); the rest is parsed by accelerate and by us."""

    def __init__(self):
        self.engines: list[str] = []
        self.before: list[tuple[int, float]] = []

    def __call__(self, words: list[str]) -> None:
        from accelerate.commands.launch import launch_command_parser

        assert words[:2] == ["accelerate", "launch"]
        args = launch_command_parser().parse_args(words[2:])
        assert (args.module, args.training_script, args.training_script_args[0]) == (True, "flashbone", "train")
        config, *overrides = [word for word in args.training_script_args[1:] if word != "--resume"]
        recipe = load_recipe(config, overrides)
        engine = yaml.safe_load(Path(args.config_file).read_text())
        assert engine["distributed_type"] == ENGINES[Path(args.config_file).stem]
        if recipe.training.get("use_cpu"):
            assert engine["num_processes"] == 2
            self.run(args.training_script_args)
            return
        assert (recipe.merge, args.num_processes) == (False, 8)
        self.engines.append(Path(args.config_file).stem)

    def run(self, words: list[str]) -> None:
        if "--resume" in words:  # as a kill leaves the run between its checkpoints and its end
            self.before = losses()
            for left in ("checkpoint-4", "checkpoint-3", "adapter"):
                shutil.rmtree(f"runs/rehearsal/{left}")
            Path("runs/rehearsal/summary.json").unlink()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=one_of_two, args=(rank, port, words)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=240)
        assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_tiny_llama(tmp_path / BASE)
    shutil.copytree(ROOT / "examples/accelerate", "examples/accelerate")
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    launched = Launched()
    run = PageRun(PAGE, replaced=SMALL, elsewhere={"accelerate": launched}).run()
    assert set(run.ran) == {"bash", "yaml"}
    assert launched.engines == list(ENGINES)

    summary = json.loads(Path("runs/rehearsal/summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["tokens"] == 4 * 2 * 4 * 14  # steps, processes, rows, tokens in a row
    assert len(launched.before) == 4
    assert losses() == launched.before  # killed and resumed, to the last bit
    merged, base = (load_file(Path(folder) / "model.safetensors") for folder in ("merged", BASE))
    changed = [name for name, weight in base.items() if (merged[name] - weight).abs().max() > 1e-3]
    assert [name for name in changed if not name.endswith("_proj.weight")] == []
    assert len(changed) == 14  # every linear layer


def test_every_flag_of_accelerate_on_the_page_exists():
    from accelerate.commands.launch import launch_command_parser

    text = (ROOT / PAGE).read_text()
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert {"--num_machines", "--machine_rank", "--main_process_ip"} <= known
    for flag in ("--num_machines", "--machine_rank", "--main_process_ip"):
        assert f"`{flag}`" in text


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_names_every_engine_that_has_a_file(engine):
    assert sorted(path.stem for path in (ROOT / "examples/accelerate").glob("*.yaml")) == sorted(ENGINES)
    title = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[engine]
    assert title in (ROOT / PAGE).read_text()
