"""docs/trainers.md runs on a tiny model in the place of the one that it names."""

import subprocess
import sys

import pytest

from helpers.pages import Block, PageRun
from helpers.stand_ins import SMOLLM2
from helpers.tiny_llama import write_tiny_llama

# Inductor would take half a minute.
PRELUDE = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='eager')\n"


class InOneProcess(PageRun):
    """The Python of the page in a process of its own, since the tests' shape checks do not compile."""

    code = PRELUDE

    def python(self, block: Block) -> None:
        self.code += f"{block.text}\n"

    def run(self) -> PageRun:
        super().run()
        command = [sys.executable, "-c", self.code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return self


@pytest.mark.slow
def test_python_blocks_of_the_page_run_one_after_the_other(place):
    write_tiny_llama(place / SMOLLM2)
    run = InOneProcess("docs/trainers.md").run()
    assert run.ran == ["python"] * 6
