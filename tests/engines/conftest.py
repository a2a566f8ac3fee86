"""SmolLM2 with adapters of every kind, and what transformers answers with them."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashbone.merge import merge_checkpoint
from helpers.adapter_folders import blocks_for, write_adapter

HERE = Path(__file__).parent
SMOLLM2 = HERE.parent.parent / ".cache/demo/smollm2"
ENVIRONMENTS = Path(os.environ.get("ENGINES", "unset"))
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUESTIONS = (
    "The three largest cities of France are Paris, Marseille and",
    "Once upon a time there was a small dog who lived near the sea. Every morning",
    "To bake bread you need flour, water,",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "The moon is",
)
NEW = 12
# variant -> standard deviation of the blocks, of r = 16: the answers change, and stay far from ties
CASES = {"bone": 0.01, "mini": 0.01, "bat-col": 0.005, "bat-row": 0.005}


@dataclass
class Answers:
    """Tokens that follow each question, and the logits of the first."""

    tokens: list[list[int]]
    logits: torch.Tensor


@dataclass
class Adapted:
    """The base, an adapter of each variant, merged models of all of them, and the answers; None is the base."""

    base: Path
    adapters: dict[str, Path]
    merged: dict[str, Path]
    prompts: list[list[int]]
    answers: dict[str | None, Answers]


def ask(program: str, python: Path, *arguments: Path, adapted: Adapted, path: str = "") -> list[dict]:
    """What an engine answers: one result for each adapter."""
    command = [str(python), str(HERE / program), *map(str, arguments)]
    asked = json.dumps({"prompts": adapted.prompts, "new": NEW})
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, input=asked, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _answers(model: torch.nn.Module, prompts: list[list[int]]) -> Answers:
    """All at once, padded on the left; the logits without padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    return Answers(out[:, width:].tolist(), torch.stack(logits))


@pytest.fixture(scope="session")
def adapted(tmp_path_factory) -> Adapted:
    if not (ENVIRONMENTS.is_dir() and SMOLLM2.is_dir()):
        pytest.skip("ENGINES names no folder with engines, or SmolLM2 is not prepared; `make test-engines` brings both")
    folder = tmp_path_factory.mktemp("adapted")
    base = folder / "base"
    shutil.copytree(SMOLLM2, base)
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # as mlx-lm wants it
    (base / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(question).input_ids for question in QUESTIONS]
    answers: dict[str | None, Answers] = {None: _answers(model, prompts)}
    adapters, merged = {}, {}
    for variant, std in CASES.items():
        torch.manual_seed(0)
        blocks = blocks_for(model, variant, ROLES, 16, std)
        adapters[variant] = write_adapter(folder / variant, variant, blocks, r=16, target_modules=list(ROLES))
        merged[variant] = folder / f"merged-{variant}"
        merge_checkpoint(SMOLLM2, adapters[variant], merged[variant])
    for variant, adapter in adapters.items():
        with_adapter = PeftModel.from_pretrained(model, str(adapter))
        answers[variant] = _answers(with_adapter, prompts)
        model = with_adapter.unload()
        changed = sum(a != b for a, b in zip(answers[variant].tokens, answers[None].tokens, strict=True))
        assert changed >= len(prompts) // 2, f"{variant} answers as the base does"
    return Adapted(base, adapters, merged, prompts, answers)
