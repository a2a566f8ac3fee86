"""A Llama's folder as GGUF in fp32, by llama.cpp's own converter: python to_gguf.py LLAMA_CPP MODEL OUT.gguf.

In a process of its own: the converter comes with a newer `gguf` than the one that flashbone is tested with."""

import importlib
import sys
from pathlib import Path

LLAMA_CPP, MODEL, OUT = (Path(argument) for argument in sys.argv[1:])
sys.path[:0] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]

gguf, conversion = importlib.import_module("gguf"), importlib.import_module("conversion")
hparams = conversion.ModelBase.load_hparams(MODEL, False)
converter = conversion.get_model_class(hparams["architectures"][0])


class WithoutTokens(converter):
    model_arch = converter.model_arch

    def set_vocab(self):
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(hparams["vocab_size"])


WithoutTokens(MODEL, gguf.LlamaFileType.ALL_F32, OUT, hparams=hparams).write()
