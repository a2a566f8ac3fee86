"""Turn PEFT's own test-suite into one for BONE: run by `make test-peft`, which then runs what this writes.

PEFT's source archive of the installed version is fetched from the package index. Wherever its tests of custom models
name MiSS (the method that replaced Bone there), they name Bone afterwards; the rows that chose a variant by
`init_weights` choose it by `variant`, and there is one more set of rows for each variant.
"""

import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

FILES = ["test_custom_models.py", "testing_common.py", "testing_utils.py", "test_config.py"]
RENAMED = {"MissConfig": "BoneConfig", "miss_": "bone_", "MiSS": "Bone", '"miss"': '"bone"'}
HEADER = re.compile(r"    ########\n    # Bone #\n    ########\n")
ROWS = """    ("{variant} 1 Bone", "MLP", BoneConfig, {{"target_modules": "lin0", {fields}}}),
    ("{variant} 2 Bone", "MLP", BoneConfig, {{"target_modules": ["lin0", "lin1"], {fields}}}),
    ("{variant} 3 Bone", "MLP", BoneConfig, {{"target_modules": "lin0", "modules_to_save": ["lin1"], {fields}}}),
    ("{variant} 4 Bone", "EmbConv1D", BoneConfig, {{"target_modules": ["conv1d"], {fields}}}),
    ("{variant} 6 Bone", "Conv2d", BoneConfig, {{"target_modules": ["conv2d", "lin0"], {fields}}}),
    ("{variant} 8 Bone", "Conv2dGroups", BoneConfig, {{"target_modules": ["conv2d"], {fields}}}),
    ("{variant} 9 Bone", "Conv3d", BoneConfig, {{"target_modules": ["conv3d"], {fields}}}),
    ("{variant} 10 Bone", "MHA", BoneConfig, {{"target_modules": ["out_proj"], {fields}}}),
    ("{variant} 11 Bone", "MlpUsingParameters", BoneConfig, {{"target_parameters": ["lin0.weight"], {fields}}}),
"""
# No rotations: the inputs of these layers have one or two features.
SMALL = """    ("{variant} 5 Bone", "Conv1d", BoneConfig, {{"target_modules": ["conv1d"], {fields}}}),
    ("{variant} 7 Bone", "Conv2d1x1", BoneConfig, {{"target_modules": ["conv2d"], {fields}}}),
"""
EMBEDDINGS = """    ("{variant} 12 Bone", "EmbConv1D", BoneConfig, {{"target_modules": ["emb", "conv1d"], {fields}}}),
"""
NAMES = ("bone", "mini", "bat-col", "bat-row", "orthogonal")
VARIANTS = {name: f'"variant": "{name}", "r": 3, "mini_r": 2' for name in NAMES}


def fetch(folder: Path) -> Path:
    """Download and unpack PEFT's source archive; returns its folder of tests."""
    name = f"peft-{version('peft')}"
    if not (folder / name).is_dir():
        index = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*index, "--dest", str(folder), name.replace("-", "==", 1)], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name / "tests"


def for_bone(text: str) -> str:
    """One file of PEFT's tests, with Bone in place of MiSS and rows for every variant."""
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    text = text.replace('"init_weights": "bat"', '"variant": "bat-col"')
    rows = "".join(ROWS.format(variant=name, fields=fields) for name, fields in VARIANTS.items())
    rows += "".join(SMALL.format(variant=name, fields=VARIANTS[name]) for name in NAMES if name != "orthogonal")
    rows += "".join(EMBEDDINGS.format(variant=name, fields=VARIANTS[name]) for name in ("bone", "mini"))
    text, _ = HEADER.subn(lambda match: match.group() + rows, text)
    return text


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    source = fetch(target)
    suite = target / "suite"
    suite.mkdir(exist_ok=True)
    (suite / "__init__.py").write_text('"""PEFT\'s tests, for BONE."""\nimport flashbone  # noqa: F401\n')
    for file in FILES:
        (suite / file).write_text(for_bone((source / file).read_text()))
    changed = (suite / "test_custom_models.py").read_text().count("BoneConfig")
    assert changed > 20, f"only {changed} places name BONE: has PEFT's suite changed its form?"
