"""The Python of docs/trainers.md runs as it stands, on a tiny model in the place of the one that it names."""

import re
import subprocess
import sys
from pathlib import Path

from helpers.tiny_llama import write_tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"

# In its own process, since the tests' shape checks do not compile; Inductor would take half a minute.
PRELUDE = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='eager')\n"


def test_python_blocks_of_the_page_run_one_after_the_other(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 7
    folder = tmp_path / re.search(r'BASE = "(.*)"', blocks[0])[1]
    folder.mkdir(parents=True)
    write_tiny_llama(folder)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapters" / "unet" / "adapter_model.safetensors").exists()
