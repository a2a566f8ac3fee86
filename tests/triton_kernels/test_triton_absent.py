"""Without triton: nothing needs it but the package that is named after it, which says so."""

import subprocess
import sys

import pytest

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


@pytest.mark.slow  # a process of its own
def test_the_ops_and_variants_never_import_the_kernels():
    run(
        "import importlib, pkgutil, sys, flashbone.ops, flashbone.variants\n"
        "for package in (flashbone.ops, flashbone.variants):\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        if module.name != 'flashbone.ops.triton':\n"
        "            importlib.import_module(module.name)\n"
        "assert 'flashbone.ops.triton' not in sys.modules"
    )


def test_the_kernels_name_the_missing_package_and_the_way_out():
    run(
        WITHOUT_TRITON + "from flashbone.errors import BackendError\n"
        "try:\n"
        "    import flashbone.ops.triton\n"
        "except BackendError as error:\n"
        "    assert 'pip install triton' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('no BackendError')"
    )
