"""The sdist and the wheel, and the wheel in an environment of its own.

The environment gets torch and everything else in the versions of constraints.txt: minutes, and 1.5 GB for that time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import tomllib
from child_cost import least_ms
from safetensors.torch import load_file

import flashbone
from helpers.comparison import Promise, same_bits

pytest.importorskip("build", reason="build is not installed; `make test-all` brings it")
pytestmark = [pytest.mark.beside, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"flashbone-{flashbone.__version__}"
HELP_MS = 300


def run(*command: object, cwd: Path, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program that sees nothing of this environment, and check its exit code."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))
    }
    own = {"HF_HOME": str(cwd / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=kept | own | more, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, the wheel that is built from it, and in `direct` the one built from the source tree."""
    folder = tmp_path_factory.mktemp("dist")
    constraints = shutil.copy(CONSTRAINTS, folder)  # pip reads several names where a path has a space
    build = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "PIP_CONSTRAINT": str(constraints)}
    whole = run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder, **build)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "direct", ROOT, cwd=folder, **build)
    (folder / "build.log").write_text(whole.stdout + whole.stderr)
    return folder


@pytest.fixture(scope="session")
def wheel(built) -> Path:
    return built / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="session")
def bin_folder(wheel, tmp_path_factory):
    """Of an environment that holds the wheel and what it asks for, and nothing else; without any extra."""
    folder = tmp_path_factory.mktemp("environment")
    run(os.environ.get("WHEEL_PYTHON") or sys.executable, "-m", "venv", folder, cwd=folder)
    install = (folder / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS)
    (torch,) = re.findall(r"^torch==.*$", CONSTRAINTS.read_text(encoding="utf-8"), re.M)
    run(*install, torch, cwd=folder)  # first and by its pin: any other way of asking takes the build for CUDA
    run(*install, wheel, cwd=folder)
    yield folder / "bin"
    shutil.rmtree(folder)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(contents(wheel)[f"{NAME}.dist-info/METADATA"].decode())


def test_an_isolated_build_installs_hatchling_and_no_torch(built):
    log = (built / "build.log").read_text()
    assert set(re.findall(r"^ +- ([\w-]+)[\w.=]*$", log, re.M)) == {"hatchling"}
    assert "torch" not in log


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    package = ROOT / "src"
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    wanted = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    about = {
        f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    assert set(contents(wheel)) == wanted | about
    assert {"flashbone/py.typed", "flashbone/compare/report/assets/page.html"} <= wanted
    assert not [name for name in contents(wheel) if "test" in Path(name).parts[0]]


def test_the_sdist_builds_the_wheel_that_the_source_tree_builds(built, wheel):
    direct = built / "direct" / wheel.name
    assert contents(wheel) == contents(direct)
    assert wheel.read_bytes() == direct.read_bytes()


def test_the_sdist_holds_what_a_packager_needs_and_no_caches(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["pyproject.toml", "PKG-INFO", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "CITATION.cff"]
    wanted += ["CONTRIBUTING.md", "Makefile", "constraints.txt", "docs/design.md", "tests/conftest.py"]
    wanted += ["examples/demo/demo.yaml", "benchmarks/__main__.py", "src/flashbone/py.typed"]
    assert [name for name in wanted if name not in held] == []
    assert [
        name for name in held if re.search(r"__pycache__|\.pyc$|^\.(venv|cache|git/|pytest)|^(dist|runs)/", name)
    ] == []


def test_the_metadata_say_what_pyproject_says(wheel):
    said = metadata(wheel)
    assert (said["Name"], said["Version"]) == ("flashbone", flashbone.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_all("License-File") == ["LICENSE"]
    assert said["Requires-Python"] == PROJECT["requires-python"]
    assert set(said.get_all("Provides-Extra") or []) == set(PROJECT["optional-dependencies"])
    assert set(said.get_all("Classifier") or []) == set(PROJECT["classifiers"])
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_nothing_that_is_installed_misses_or_contradicts_anything(bin_folder, tmp_path):
    assert "No broken requirements" in run(bin_folder / "python", "-m", "pip", "check", cwd=tmp_path).stdout


def test_the_library_comes_from_the_wheel_with_its_types_and_assets(bin_folder, tmp_path):
    code = """
import sys, flashbone
from importlib.resources import files
from importlib.metadata import version
assert flashbone.__file__.startswith(sys.prefix), flashbone.__file__
assert version("flashbone") == flashbone.__version__
assert files("flashbone").joinpath("py.typed").is_file()
assert files("flashbone.compare.report").joinpath("assets", "page.html").is_file()
assert "torch" not in sys.modules
from peft import BoneConfig
assert BoneConfig is flashbone.BoneConfig
"""
    run(bin_folder / "python", "-W", "error::SyntaxWarning", "-c", code, cwd=tmp_path)


def test_the_command_answers(bin_folder, tmp_path):
    command = bin_folder / "flashbone"
    assert run(command, "--version", cwd=tmp_path).stdout == f"flashbone {flashbone.__version__}\n"
    assert "usage: flashbone COMMAND" in run(command, "--help", cwd=tmp_path).stdout
    for name in ("train", "compare", "eval", "inspect", "merge", "convert"):
        assert f"flashbone {name}" in run(command, name, "--help", cwd=tmp_path).stdout


def test_the_command_answers_within_300_ms(bin_folder):
    ((cpu, wall),) = least_ms([[str(bin_folder / "flashbone"), "--help"]])
    print(f"flashbone --help: {cpu:.0f} ms of CPU, {wall:.0f} ms")
    assert cpu < HELP_MS


def test_without_an_extra_the_command_names_it(bin_folder, tmp_path):
    said = run(bin_folder / "flashbone", "train", "recipe.yaml", cwd=tmp_path, code=1)
    missing = [f"{wanted}, which is not installed" for wanted in sorted(PROJECT["optional-dependencies"]["train"])]
    assert said.stderr == (
        f'flashbone train: error: flashbone needs {"; ".join(missing)}; run: pip install -U "flashbone[train]"\n'
    )


TRAIN = """
import sys, torch, flashbone
from peft import BoneConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=44, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained("base")
base = lambda: AutoModelForCausalLM.from_pretrained("base")
model = get_peft_model(base(), BoneConfig(r=8, variant=sys.argv[1], target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
tokens = torch.randint(64, (2, 16))
losses = []
for _ in range(4):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
model.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(base(), "adapter").eval()
with torch.no_grad():
    plain, adapted, trained = (one(tokens).logits for one in (base().eval(), loaded, model.eval()))
assert (adapted - plain).abs().max() > 1e-2
save_file({"tokens": tokens, "adapted": adapted, "trained": trained}, "expected.safetensors")
"""
COMPARE = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

expected = load_file("expected.safetensors")
with torch.no_grad():
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()(expected["tokens"]).logits
torch.testing.assert_close(merged, expected["adapted"], rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("variant", ["bone", "bat-row"])
def test_a_tiny_model_is_inspected_adapted_saved_loaded_and_merged(bin_folder, tmp_path, variant):
    python, command = bin_folder / "python", bin_folder / "flashbone"
    run(python, "-c", TRAIN, variant, cwd=tmp_path)
    logits = load_file(tmp_path / "expected.safetensors")
    assert same_bits(logits["adapted"], logits["trained"], Promise.SAME_PRODUCT)
    costs = json.loads(run(command, "inspect", "base", "--adapter.r", "8", "--json", cwd=tmp_path).stdout)["costs"]
    assert costs["r"] == 8
    assert costs["trainable_parameters"] > 0
    held = json.loads(run(command, "inspect", "adapter", "--json", cwd=tmp_path).stdout)
    assert variant in json.dumps(held)
    assert "merged" in run(command, "merge", "base", "adapter", "merged", cwd=tmp_path).stdout
    run(python, "-c", COMPARE, cwd=tmp_path)
