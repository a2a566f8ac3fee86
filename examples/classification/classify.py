"""Teach a small BERT to sort news by topic with Bone: accuracy before and after, then the adapter on new headlines.

python -m examples.classification.classify [RECIPE.yaml]
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import flashbone.cli  # `import flashbone` is what teaches PEFT to load the adapter

RECIPE = "examples/classification/classify.yaml"
HEADLINES = (
    "Striker signs a three-year contract after the cup final",
    "Central bank raises interest rates as inflation climbs",
    "New phone chip runs games twice as fast",
)


@torch.no_grad()
def topics(adapter: Path, base_folder: str, labels: list[str], texts: tuple[str, ...]) -> list[str]:
    """The most likely topic of each text, from the saved adapter on a freshly loaded base."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=len(labels))
    model = PeftModel.from_pretrained(base, adapter).eval()
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    return [labels[i] for i in model(**inputs).logits.argmax(-1)]


def main(path: str = RECIPE) -> int:
    """Train and report; the exit code of `flashbone train` if it fails."""
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    out = Path(recipe["output"])
    shutil.rmtree(out, ignore_errors=True)  # an earlier run of this example
    print(f"$ flashbone train {path}", flush=True)
    if code := flashbone.cli.main(["train", path]):
        return code
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["eval_accuracy_before"], summary["eval_accuracy_after"]
    print(f"\nAccuracy on {summary['eval_rows']} held-out articles: {before:.2f} before, {after:.2f} after")
    print("\nThe adapter, loaded again, on headlines:")
    for text, topic in zip(
        HEADLINES, topics(out / "adapter", recipe["model"], summary["labels"], HEADLINES), strict=True
    ):
        print(f"  {topic:14} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
