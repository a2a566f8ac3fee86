"""`import flashbone`, before or after peft, registers BONE; it is light, and refuses a PEFT that is too old."""

import subprocess
import sys

import pytest

import flashbone
from flashbone.import_hook import when_imported

USE = """
from peft import BoneConfig, BoneModel, PeftConfig, get_peft_config
from peft.tuners import BoneConfig as also
from peft.tuners.bone import BoneConfig as old, BoneLayer, BoneLinear, BoneModel as old_model
from peft.tuners.bone.layer import BoneLinear as deep
import flashbone, flashbone.tuner.layers.layer
assert BoneConfig is old is also is flashbone.BoneConfig and BoneModel is old_model is flashbone.BoneModel
assert BoneLinear is deep is flashbone.BoneLinear is flashbone.tuner.layers.layer.BoneLinear
import importlib.util, peft
assert importlib.util.find_spec("peft.tuners.bone") is not None and {"BoneConfig", "BoneModel"} <= set(peft.__all__)
assert type(get_peft_config({"peft_type": "BONE", "r": 8})) is BoneConfig
"""


FIRST = [
    "import flashbone, peft",
    "import peft, flashbone",
    "from flashbone import BoneLinear",
    "import flashbone.tuner.layers.layer",
]


@pytest.mark.slow
@pytest.mark.parametrize("order", FIRST)
def test_bone_is_back_whichever_is_imported_first(order):
    done = subprocess.run([sys.executable, "-c", order + "\n" + USE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_threads_may_import_it_first():
    code = """
import threading, time
failures = []
def run(delay, code):
    time.sleep(delay)
    try:
        exec(code)
    except BaseException as error:
        failures.append(error)
import flashbone
jobs = [(0, "from peft import BoneConfig"), (0.3, "from flashbone import BoneConfig"), (0.6, "import peft.tuners.bone")]
threads = [threading.Thread(target=run, args=job) for job in jobs]
[t.start() for t in threads], [t.join() for t in threads]
assert not failures, failures
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_flashbone_is_light():
    code = """
import sys
before = set(sys.modules)
import flashbone
loaded = set(sys.modules) - before
assert not {"torch", "peft", "transformers", "numpy", "asyncio"} & set(sys.modules), "a heavy module was imported"
assert len(loaded) < 60, sorted(loaded)  # its own three, typing, re and the like
assert flashbone.__version__ and "BoneConfig" in dir(flashbone)
assert not hasattr(flashbone, "no_such_name")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_import_hook_survives_spec_lookups_and_failed_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "hooked_module.py"
    module.write_text("raise RuntimeError('half way')")
    seen = []
    when_imported("hooked_module", seen.append)
    import importlib
    import importlib.util

    assert importlib.util.find_spec("hooked_module") is not None
    with pytest.raises(RuntimeError, match="half way"):
        importlib.import_module("hooked_module")
    assert seen == []
    module.write_text("value = 1  # now whole, and longer")
    importlib.invalidate_caches()
    loaded = importlib.import_module("hooked_module")
    assert seen == [loaded]
    when_imported("hooked_module", seen.append)
    assert seen == [loaded, loaded]
    assert not [finder for finder in sys.meta_path if getattr(finder, "name", None) == "hooked_module"]


def test_every_public_name_can_be_imported():
    for name in flashbone.__all__:
        assert getattr(flashbone, name).__name__ == name
