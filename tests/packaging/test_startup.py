"""How fast the library and its command start."""

import sys

from child_cost import cpu_and_wall_ms, least_ms

IMPORT_MS, HELP_MS = 50, 300
BARE = [sys.executable, "-c", "pass"]
IMPORT = [sys.executable, "-c", "import flashbone"]
HELP = [sys.executable, "-m", "flashbone", "--help"]


def test_the_import_takes_under_50_ms_and_help_under_300_ms(record_property):
    (bare, bare_wall), (imported, imported_wall), (helped, helped_wall) = least_ms([BARE, IMPORT, HELP])
    record_property("import_ms", (imported - bare, imported_wall - bare_wall))
    record_property("help_ms", (helped, helped_wall))
    assert imported - bare < IMPORT_MS
    assert helped < HELP_MS


def test_an_import_of_torch_would_break_both_limits():
    cpu, _ = cpu_and_wall_ms([sys.executable, "-c", "import torch"])
    assert cpu > IMPORT_MS + HELP_MS
