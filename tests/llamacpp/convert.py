"""Convert tiny models, and LoRAs on them, with llama.cpp's own converters: python convert.py LLAMA_CPP OUT.

In a process of its own: the converters come with a newer `gguf` than the one that flashbone is tested with. For each
architecture: OUT/<architecture>/{model/, model.gguf, lora/, lora.gguf}; lora/ is PEFT's, on every linear layer.
"""

import json
import runpy
import sys
from pathlib import Path

LLAMA_CPP, OUT = sys.argv[1], Path(sys.argv[2])
sys.path[:0] = [LLAMA_CPP, f"{LLAMA_CPP}/gguf-py", str(Path(__file__).parent)]

import gguf
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MODELS, VOCABULARY, linear_layers, tiny

from conversion import ModelBase, get_model_class

RANK = 3


def main() -> None:
    for architecture in MODELS:
        folder = OUT / architecture
        model = tiny(architecture)
        model.save_pretrained(folder / "model")
        tokens = {"model": {"vocab": {str(i): i for i in range(VOCABULARY)}}, "added_tokens": []}
        (folder / "model" / "tokenizer.json").write_text(json.dumps(tokens))  # Gemma 3's reads how many there are
        write_lora(model, folder / "lora")
        convert_model(folder, architecture)
        convert_lora(folder)


def write_lora(model: torch.nn.Module, folder: Path) -> None:
    targets = list(linear_layers(model))
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def convert_model(folder: Path, architecture: str) -> None:
    found = get_model_class(architecture)

    class WithoutTokens(found):
        model_arch = found.model_arch

        def set_vocab(self):
            self.gguf_writer.add_tokenizer_model("none")
            self.gguf_writer.add_vocab_size(VOCABULARY)

    hparams = ModelBase.load_hparams(folder / "model", False)
    file_type = gguf.LlamaFileType.ALL_F32
    WithoutTokens(folder / "model", file_type, folder / "model.gguf", hparams=hparams).write()


def convert_lora(folder: Path) -> None:
    script, arguments = f"{LLAMA_CPP}/convert_lora_to_gguf.py", ("--base", folder / "model", folder / "lora")
    sys.argv = [script, "--outfile", str(folder / "lora.gguf"), *map(str, arguments)]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
