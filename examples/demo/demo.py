"""Fine-tune a small chat model with Bone: answers and held-out loss before and after, then merge and compare."""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashbone.cli  # `import flashbone` is what teaches PEFT to load the adapter

RECIPE = Path("examples/demo/demo.yaml")
QUESTIONS = ("Are you a robot?", "Do you get angry?", "What is your favorite food?")  # none is in the training data
# Merging rounds each weight once, the adapter each sum: 30 layers of fp32 end about 1e-5 apart. An adapter that was
# not merged, or merged into the wrong place, is off by about 1.
TOLERANCE = 1e-4


def answer(model, tokenizer, question: str) -> str:
    """The model's most likely answer, cut after 40 tokens."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split())


def print_answers(title: str, model, tokenizer) -> None:
    """The three questions and what the model says to them."""
    print(f"\n{title}")
    for question in QUESTIONS:
        print(f"  {question:30} {answer(model, tokenizer, question)}")


@torch.no_grad()
def logit_difference(model, other, tokenizer) -> float:
    """Largest difference between two models' logits on the questions, relative to the RMS of the first's."""
    inputs = tokenizer(list(QUESTIONS), padding=True, return_tensors="pt")
    want, got = model(**inputs).logits, other(**inputs).logits
    return ((got - want).abs().max() / want.square().mean().sqrt()).item()


def run(*command: str) -> None:
    """Run a flashbone command as a shell would; stop where it fails."""
    print(f"\n$ flashbone {' '.join(command)}", flush=True)
    if code := flashbone.cli.main(list(command)):
        sys.exit(code)


def main() -> int:
    """The whole demo; 1 if the merged model is not the adapted one."""
    started = time.perf_counter()
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    base_folder, out = recipe["model"], Path(recipe["output"])
    shutil.rmtree(out, ignore_errors=True)  # an earlier run of this demo

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    print_answers("Before:", base, tokenizer)

    run("train", str(RECIPE))
    run("merge", base_folder, str(out / "adapter"), str(out / "merged"))

    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    print_answers("After, from the merged model:", merged, tokenizer)

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    print(f"\nHeld-out loss: {summary['eval_loss_before']:.3f} before, {summary['eval_loss_after']:.3f} after")
    difference = logit_difference(adapted, merged, tokenizer)
    print(f"Merged against adapter: logits differ by at most {difference:.1e} of their RMS (limit {TOLERANCE:.0e})")
    print(f"Done in {time.perf_counter() - started:.0f} s. Talk to the result (flashbone is in .venv/bin):")
    print(f"  flashbone chat {out / 'merged'}")
    return int(not difference <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
