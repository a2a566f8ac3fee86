"""A package that is missing or too old gives one clear line, and peft can still be imported."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from flashbone import floors
from flashbone.cli import main
from flashbone.errors import FlashboneError, OutdatedPackageError

OLD_PEFT = Path(__file__).parents[1] / ".venv" / "peft-0.18.1"
LINE = 'flashbone needs peft>=0.21, but peft 0.18.1 is installed; run: pip install -U "peft>=0.21"'


@pytest.fixture(autouse=True)
def _asked_anew():
    floors.are_met.cache_clear()
    yield
    floors.are_met.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Says which versions of packages are installed, and of what flashbone requires; None is not installed."""

    def install(requires: list[str], **versions: str | None) -> None:
        def version(name: str) -> str:
            if versions.get(name) is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, "requires", lambda name: requires)
        monkeypatch.setattr(metadata, "version", version)

    return install


def test_this_environment_meets_every_floor():
    floors.check("train")
    assert floors.are_met()


def test_every_package_below_its_floor_is_named_in_one_line(installed, caplog):
    requires = ["peft>=0.21", "torch>=2.6", "einops>=0.8", "rich>=13", 'trl>=1.0; extra == "train"']
    installed(requires, peft="0.19.1", torch="2.13.0+cpu", rich="12.6.0", trl="0.29.1")
    line = (
        "flashbone needs peft>=0.21, but peft 0.19.1 is installed; einops>=0.8, which is not installed;"
        ' rich>=13, but rich 12.6.0 is installed; run: pip install -U "peft>=0.21" "einops>=0.8" "rich>=13"'
    )
    with pytest.raises(OutdatedPackageError) as raised:
        floors.check()
    assert str(raised.value) == line
    assert isinstance(raised.value, FlashboneError)
    assert not floors.are_met()
    assert not floors.are_met()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("BONE is not available: flashbone needs peft>=0.21, but peft 0.19.1 is installed; einops")
    assert "rich" not in said


def test_adapters_work_beside_old_packages_of_the_commands_alone(installed):
    installed(["peft>=0.21", "rich>=14.3"], peft="0.21.0", rich="13.0.0")
    assert floors.are_met()
    with pytest.raises(OutdatedPackageError, match="rich 13"):
        floors.check()


def test_an_extra_is_checked_where_it_is_asked_for(installed):
    installed(["peft>=0.21", 'trl>=1.0; extra == "train"', 'rwkv>=0.8; extra == "rwkv"'], peft="0.21.0", trl="0.29.1")
    floors.check()
    with pytest.raises(OutdatedPackageError) as raised:
        floors.check("train")
    remedy = 'run: pip install -U "flashbone[train]"'
    assert str(raised.value) == f"flashbone needs trl>=1.0, but trl 0.29.1 is installed; {remedy}"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_command_names_what_its_extra_misses(command, installed, capsys):
    installed(["peft>=0.21", 'trl>=1.0; extra == "train"'], peft="0.21.0")
    assert main([command, "any.yaml"]) == 1
    want = 'flashbone needs trl>=1.0, which is not installed; run: pip install -U "flashbone[train]"'
    assert capsys.readouterr().err == f"flashbone {command}: error: {want}\n"


@pytest.mark.parametrize("command", ["merge", "inspect", "eval"])
def test_every_command_names_an_old_host(command, installed, capsys):
    installed(["peft>=0.21"], peft="0.19.1")
    assert main([command, "any", "thing"]) == 1
    want = 'flashbone needs peft>=0.21, but peft 0.19.1 is installed; run: pip install -U "peft>=0.21"'
    assert capsys.readouterr().err == f"flashbone {command}: error: {want}\n"


def test_prereleases_and_local_builds_count_by_their_number(installed):
    installed(["peft>=0.21", "torch>=2.6"], peft="0.22.0.dev0", torch="2.6.0+cu124")
    floors.check()


@pytest.mark.slow
@pytest.mark.skipif(
    not OLD_PEFT.is_dir(), reason="peft 0.18.1 is not installed beside the environment (make test does)"
)
@pytest.mark.parametrize("first", ["flashbone", "peft", "transformers"])
def test_an_old_peft_can_still_be_imported_and_used(first, tmp_path):
    code = f"""
import {first}
import flashbone, peft, torch
from peft import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
print(tuple(model(torch.ones(1, 4)).shape), peft.BoneConfig.__module__)
try:
    from flashbone import BoneConfig
except ImportError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(OLD_PEFT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"(1, 4) peft.tuners.bone.config\n{LINE}\n"
    assert done.stderr == f"BONE is not available: {LINE}\n"
