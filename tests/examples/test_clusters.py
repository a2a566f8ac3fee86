"""examples/clusters: each file is run as far as one machine can, and what it would start is read."""

import ast
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from flashbone.cli.configured import separate
from flashbone.cli.train import OPTIONS, VALUED, make_parser
from flashbone.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "examples" / "clusters"
RECIPE = "examples/train_sft.yaml"
# What SkyPilot 0.14 knows at the top of a task, and of what is used here.
TASK = {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run"}

STUBS = {
    # More than a pipe holds: a reader that takes the first line and leaves would end it by SIGPIPE.
    "scontrol": '[ "$*" = "show hostnames first,second" ] && printf "first\\nsecond\\n%0200000d\\n" 0',
    # A task a node, each with its number.
    "srun": 'while [[ $1 == --* ]]; do shift; done\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'printf "%s\\n" "$@" "END" >> "$STARTED"',
    "pip": "true",
}


@pytest.fixture
def cluster(tmp_path):
    """Runs a script with stand-ins of the cluster's programs; returns what accelerate was started with, each time."""
    for name, body in STUBS.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)

    def run(script, *args, **variables):
        started = tmp_path / "started"
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STARTED": str(started), **variables}
        subprocess.run(["bash", "-eu", str(script), *args], env=environment, cwd=ROOT, check=True, timeout=30)
        return [entry.split("\n") for entry in started.read_text().removesuffix("\nEND\n").split("\nEND\n")]

    return run


def check_start(words, rank, address):
    """accelerate and flashbone understand what was started; returns the recipe."""
    assert words[0] == "launch"
    args = launch_command_parser().parse_args(words[1:])
    assert (args.num_machines, args.machine_rank, args.num_processes) == (2, rank, 16)
    assert (args.multi_gpu, args.module, args.training_script) == (True, True, "flashbone")
    assert args.main_process_ip == address
    assert 1024 < args.main_process_port < 65536
    assert args.training_script_args[0] == "train"
    ours, overrides = separate(args.training_script_args[1:], OPTIONS, VALUED)
    options = make_parser().parse_args(ours)
    assert options.resume
    return load_recipe(options.config, overrides)


def test_the_slurm_script_starts_a_launcher_on_each_of_two_nodes(cluster, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = CLUSTERS / "slurm.sh"
    wanted = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in script.read_text().splitlines()
        if "#SBATCH --" in line and "=" in line
    )
    assert (wanted["nodes"], wanted["ntasks-per-node"], wanted["gpus-per-node"]) == ("2", "1", "8")
    nodes = {
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    starts = cluster(script, RECIPE, "--data.path", "my rows.jsonl", **nodes)
    assert len(starts) == 2
    for rank, words in enumerate(starts):
        assert check_start(words, rank, "first").data.path == "my rows.jsonl"


def test_the_task_for_skypilot_starts_a_launcher_on_each_of_two_machines(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    task = yaml.safe_load((CLUSTERS / "sky.yaml").read_text())
    assert task.keys() == TASK
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"].endswith(":8")
    [(bucket, store)] = task["file_mounts"].items()
    assert store["mode"] == "MOUNT"
    script = tmp_path / "script.sh"
    script.write_text(task["setup"] + task["run"])
    machines = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    for rank in (0, 1):
        starts = cluster(script, **machines, **task["envs"], SKYPILOT_NODE_RANK=str(rank))
        assert check_start(starts[rank], rank, "10.0.0.1").output.startswith(bucket)


def test_the_program_for_ray_is_python_that_names_what_exists():
    tree = ast.parse((CLUSTERS / "ray_train.py").read_text())
    ours = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flashbone")
    ]
    assert {(node.module, node.names[0].name) for node in ours} == {
        ("flashbone.train.recipe", load_recipe.__name__),
        ("flashbone.train.run", "train"),
    }
