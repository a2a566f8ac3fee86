"""`flashbone run NAME`: another package's console script, and the processes that it starts, with BONE in PEFT."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashbone
from flashbone import cli

TOOL = """
import subprocess, sys
def main():
    print(sys.argv[1:], "flashbone" in sys.modules, flush=True)
    look = "import sys; print('flashbone' in sys.modules, 'torch' in sys.modules, 'mark' in sys.modules)"
    subprocess.run([sys.executable, "-c", look])
    if "fail" in sys.argv:
        raise ValueError("of the tool")
    return 3
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With a package `tool`, and a sitecustomize of somebody else."""
    (tmp_path / "tool.py").write_text(TOOL)
    (tmp_path / "tool-1.0.dist-info").mkdir()
    (tmp_path / "tool-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n")
    (tmp_path / "tool-1.0.dist-info/entry_points.txt").write_text("[console_scripts]\ntrainer-tool = tool:main\n")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mark'] = sys\n")
    source = Path(flashbone.__file__).parent.parent
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}


def run(environment, *arguments):
    command = [sys.executable, "-m", "flashbone", "run", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_script_and_its_processes_know_flashbone(environment):
    done = run(environment, "trainer-tool", "train", "--rank", "4", "--help")
    assert done.stdout == "['train', '--rank', '4', '--help'] True\nTrue False True\n"
    assert done.returncode == 3


def test_a_failure_of_the_script_is_told_as_the_script_s(environment):
    done = run(environment, "trainer-tool", "fail")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: of the tool")
    assert "flashbone run: error" not in done.stderr


def test_an_unknown_script_is_one_line(capsys):
    assert cli.main(["run", "pytst"]) == 1
    assert "pytst: no installed package has a console script of that name; did you mean 'pytest'?" in (
        capsys.readouterr().err
    )
