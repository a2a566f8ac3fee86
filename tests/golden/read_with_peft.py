"""Load BONE adapters with the PEFT on the path (the tests run it with 0.18.1) and write what the model then does.

Usage: read_with_peft.py '{"ADAPTER": [12, 8, 6], ...}'; ADAPTER/theirs.safetensors is written for each.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
from peft import PeftModel
from safetensors.torch import save_file

from helpers.mlp import MLP, results

if __name__ == "__main__":
    assert peft.__version__ == "0.18.1", peft.__version__
    for adapter, sizes in json.loads(sys.argv[1]).items():
        model = PeftModel.from_pretrained(MLP(sizes), adapter, is_trainable=True)
        found = {k: v.contiguous() for k, v in results(model, sizes[0]).items()}
        save_file(found, Path(adapter) / "theirs.safetensors")
