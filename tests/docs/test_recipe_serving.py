"""docs/recipes/serving.md is followed from top to bottom with a tiny Llama; engines are checked by their input."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashbone.conversion import engines
from helpers.comparison import close
from helpers.pages import run_page
from helpers.tiny_llama import write_tiny_llama

PAGE = "docs/recipes/serving.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Flags besides those of `engines`: vllm-project/vllm docs/features/lora.md; llama.cpp tools/server/README.md and
# convert_hf_to_gguf.py, as in llama-cpp-python 0.3.36; ollama/ollama docs/modelfile.md.
FLAGS = {
    "vllm": set(),
    "llama.cpp": {"--port"},
    "ollama": set(),
    "sglang": set(),
    "tgi": set(),
}


def rank_of(folder: str) -> int:
    return json.loads((Path(folder) / "adapter_config.json").read_text())["r"]


def check_flags(engine: str, words: list[str]) -> None:
    known = FLAGS[engine] | {word for word in engines.get(engine).start.split() if word.startswith("-")}
    assert {word for word in words if word.startswith("-")} <= known, words


def named_folders(words: list[str]) -> None:
    """NAME=FOLDER, one word each or separated by commas: LoRAs that were written for it."""
    pairs = [pair.split("=") for word in words if "=" in word for pair in word.split(",")]
    assert [name for name, _ in pairs] == ["one"]
    for _, folder in pairs:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        assert (config["peft_type"], config["lora_alpha"]) == ("LORA", config["r"])


def vllm(words: list[str]) -> None:
    assert words[:2] == ["vllm", "serve"]
    check_flags("vllm", words)
    assert (Path(words[2]) / "config.json").is_file()
    if "--enable-lora" in words:
        named_folders(words)
        most = int(words[words.index("--max-lora-rank") + 1])
        assert most == rank_of("one")
        assert most in engines.get("vllm").ranks


def python(words: list[str]) -> None:
    if words[1] == "-m":
        check_flags("sglang", [word for word in words if word != "-m"])
        assert words[2] == "sglang.launch_server"
        named_folders(words)
    else:
        assert words[1] == "convert_hf_to_gguf.py"
        assert (Path(words[2]) / "model.safetensors").is_file()
        assert words[3::2] == ["--outfile", "--outtype"]
        assert words[-1] in ("f32", "f16", "bf16", "q8_0")


def tgi(words: list[str]) -> None:
    check_flags("tgi", words)
    named_folders(words)


def llama_server(words: list[str]) -> None:
    check_flags("llama.cpp", words)
    if "--lora" in words:
        for file in words[words.index("--lora") + 1].split(","):
            fields = GGUFReader(file).fields
            rank = rank_of(file.removesuffix(".gguf"))
            assert fields["adapter.lora.alpha"].contents() == rank  # alpha / rank is what llama.cpp multiplies by
            assert {min(t.shape) for t in GGUFReader(file).tensors if t.name.endswith("lora_a")} <= {rank, 32, 72}


def ollama(words: list[str]) -> None:
    if words[1] == "create":
        assert words[2:4] == ["one", "-f"]
        lines = [line for line in Path(words[4]).read_text().splitlines() if not line.startswith("#")]
        assert lines == [f"FROM {Path(BASE).absolute()}", "ADAPTER ./adapter.gguf"]
        assert Path(words[4]).with_name("adapter.gguf").read_bytes() == Path("one.gguf").read_bytes()
    else:
        assert words[1:3] == ["run", "one"]


def curl(words: list[str]) -> None:
    url, body = words[1], json.loads(words[-1])
    assert words[2:5] == ["-H", "Content-Type: application/json", "-d"]
    assert body["temperature"] == 0
    assert url.endswith("/v1/completions")
    assert body.keys() == {"model", "prompt", "max_tokens", "temperature"}
    assert body["model"] == "one"


class Server(BaseHTTPRequestHandler):
    """The completions of vLLM, by PEFT: the LoRA folder that a request names, or the base under its own name."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, body["temperature"]) == ("/v1/completions", 0)
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        if body["model"] != BASE:
            model = PeftModel.from_pretrained(model, body["model"])
            assert isinstance(model.peft_config["default"], LoraConfig)
        ids = tokenizer(body["prompt"], return_tensors="pt")
        out = model.eval().generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        answer = json.dumps({"choices": [{"text": text}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Iterator[dict]:
    folder = tmp_path_factory.mktemp("serving")
    (folder / BASE).mkdir(parents=True)
    write_tiny_llama(folder / BASE)
    server = ThreadingHTTPServer(("localhost", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    small = {"localhost:8000": f"localhost:{server.server_port}", "learning_rate: 1.0e-3": "learning_rate: 2.0e-2"}
    elsewhere = {"vllm": vllm, "python": python, "text-generation-launcher": tgi, "llama-server": llama_server}
    elsewhere |= {"ollama": ollama, "curl": curl}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield run_page(PAGE, replaced=small, elsewhere=elsewhere).names
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_served_answers_are_the_trained_ones_and_the_base_s_are_not(names):
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [names["trained"](row["prompt"]).split() for row in rows] == [row["completion"].split() for row in rows]
    assert names["differing"](names["prompts"], "one") == []
    assert names["differing"](names["prompts"], BASE) == names["prompts"]


@pytest.mark.slow
def test_prompts_that_the_base_answers_alike_prove_nothing(names, monkeypatch):
    monkeypatch.setitem(names, "trained", lambda prompt: "the same")
    with pytest.raises(AssertionError, match="the base gives the same answers"):
        names["differing"](names["prompts"], "one")


@pytest.mark.slow
def test_the_merged_model_and_the_lora_are_what_the_page_calls_exact(names):
    tokens = torch.arange(2, 14).view(1, -1)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        want = names["model"](tokens).logits
        merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(tokens).logits
        lora = PeftModel.from_pretrained(base, "one")(tokens).logits
    assert rank_of("one") == 64
    assert close(merged, want)
    assert close(lora, want)
    assert "vllm serve" in Path("one/SERVE.md").read_text()
