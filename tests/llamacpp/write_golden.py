"""Write what llama.cpp's converter does with the layers of each architecture: python write_golden.py CONVERTED.

CONVERTED is the folder that convert.py wrote. Of the last layer and the head, tests/golden/gguf.json holds the tensor's
name and sizes, and which row of B comes where, if not in their own order; of config.json what the names depend on.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from running import read_peft
from tiny_models import MODELS

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf.json"
FIELDS = ("architectures", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")


def layers_of(folder: Path) -> tuple[dict, dict]:
    lora = read_peft(folder / "lora", folder / "model")
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(folder / "lora.gguf").tensors}
    by_input = {value.tobytes(): name for name, value in tensors.items() if name.endswith(".lora_a")}
    layers = {}
    for module, (A, B) in lora.factors.items():
        if ".0." not in module:
            tensor = by_input[A.numpy().tobytes()].removesuffix(".lora_a")  # A is there as it is
            rows = [np.flatnonzero((B.numpy() == row).all(1)).item() for row in tensors[f"{tensor}.lora_b"]]
            layers[module] = [tensor, len(B), A.shape[1], None if rows == sorted(rows) else rows]
    return lora.base_config, layers


def main(converted: Path) -> None:
    golden = {}
    for architecture in sorted(set(MODELS) - {"GPT2LMHeadModel"}):  # see test_architectures.py
        config, layers = layers_of(converted / architecture)
        kept = {name: value for name, value in config.items() if name in FIELDS}
        if "text_config" in config:
            kept["text_config"] = {n: value for n, value in config["text_config"].items() if n in FIELDS}
        golden[architecture] = {"config": kept, "layers": layers}
    lines = []
    for name, entry in golden.items():
        layers = ",\n".join(f"  {json.dumps(module)}: {json.dumps(layer)}" for module, layer in entry["layers"].items())
        lines.append(f'"{name}": {{"config": {json.dumps(entry["config"])}, "layers": {{\n{layers}}}}}')
    GOLDEN.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
