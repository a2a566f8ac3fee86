"""Losses of language models against transformers' own and against those that training reports."""

import json
import math
from pathlib import Path

import pytest
import torch

from flashbone.errors import ConfigError
from flashbone.evaluate.perplexity import MAX_LENGTH, perplexity, pieces_of
from flashbone.train.data.formats import converter

TEXTS = [
    "the cat sat on the mat .",
    "where was the big red dog ?",
    "yes",
    "it was under a tree , it ran and the small cat did sat",
]


def values(evaluation):
    return {one.name: one for one in evaluation.figures}


def own_loss(model, ids, labels=None):
    """transformers' mean loss and the number of tokens that it is of."""
    ids = torch.tensor([ids])
    labels = ids if labels is None else torch.tensor([labels])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss), int((labels[:, 1:] != -100).sum())


def pooled(pairs):
    return sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)


def test_as_many_tokens_are_seen_at_once_as_in_training():
    from trl import SFTConfig

    assert SFTConfig.__dataclass_fields__["max_length"].default == MAX_LENGTH


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_texts_is_transformers_own_with_the_end_token(model, tokenizer, batch_size):
    found = perplexity(model, tokenizer, [{"text": text} for text in TEXTS], batch_size=batch_size)
    want = pooled([own_loss(model, [*tokenizer(text)["input_ids"], 2]) for text in TEXTS])
    figures = values(found)
    assert figures["loss (nats per token)"].value == pytest.approx(want, rel=1e-5)
    assert figures["perplexity"].value == pytest.approx(math.exp(want), rel=1e-5)
    assert found.rows == 4
    low, high = figures["perplexity"].low, figures["perplexity"].high
    assert low < math.exp(want) < high
    assert math.log(low) == pytest.approx(figures["loss (nats per token)"].low)


def test_bits_per_byte_are_those_of_the_bytes_after_the_first_token(model, tokenizer):
    found = perplexity(model, tokenizer, [{"text": text} for text in TEXTS])
    bits = sum(loss * n for loss, n in (own_loss(model, [*tokenizer(t)["input_ids"], 2]) for t in TEXTS)) / math.log(2)
    size = sum(len(text) - len(text.split()[0]) for text in TEXTS)
    assert values(found)["bits per byte"].value == pytest.approx(bits / size, rel=1e-5)


def test_only_the_completion_is_learned_and_bits_per_byte_are_left_out(model, tokenizer):
    example = {"prompt": "where was the cat ?", "completion": " on the mat"}
    found = perplexity(model, tokenizer, [example])
    ids = [*tokenizer("where was the cat ? on the mat")["input_ids"], 2]
    want, count = own_loss(model, ids, [-100] * 5 + ids[5:])
    assert values(found)["loss (nats per token)"].value == pytest.approx(want, rel=1e-5)
    assert found.details["tokens"] == count == 4
    assert "bits per byte" not in values(found)
    assert values(found)["perplexity"].low is None, "of one row there is no interval"


def test_each_answer_of_a_conversation_is_learned(model, tokenizer):
    turns = [("user", "where"), ("assistant", "on the mat"), ("user", "who"), ("assistant", "the cat")]
    row = converter("messages", {})({"messages": [{"role": r, "content": c} for r, c in turns]})
    pieces = pieces_of(0, row, tokenizer, 99)
    learned = [tokenizer.decode([i for i in piece.labels if i != -100]) for piece in pieces]
    assert learned == ["on the mat </s> the cat </s>"]
    assert tokenizer.decode(pieces[0].ids).startswith("<|user|> where </s> <|assistant|> on the mat")


def test_long_texts_are_windows_in_which_every_token_but_the_first_is_learned_once(model, tokenizer):
    long = " ".join(TEXTS * 3)
    ids = [*tokenizer(long)["input_ids"], 2]
    found = perplexity(model, tokenizer, [{"text": long}], max_length=16)
    assert found.details["tokens"] == len(ids) - 1
    want = pooled([own_loss(model, ids[start : start + 16]) for start in range(0, len(ids) - 1, 15)])
    assert values(found)["loss (nats per token)"].value == pytest.approx(want, rel=1e-5)


def test_progress_counts_each_row_once_though_it_is_many_windows(model, tokenizer):
    seen = []
    examples = [{"text": " ".join(TEXTS)}, {"text": TEXTS[0]}, {"text": TEXTS[1]}]
    perplexity(model, tokenizer, examples, max_length=5, batch_size=2, progress=seen.append)
    assert sum(seen) == 3


def test_rows_of_which_nothing_is_learned_are_counted_and_token_ids_are_checked(model, tokenizer):
    good, cut = {"prompt": "the", "completion": " cat"}, {"prompt": " ".join(["the"] * 12), "completion": " cat"}
    found = perplexity(model, tokenizer, [good, cut], max_length=8)
    assert (found.rows, found.details["dropped_rows"]) == (1, 1)
    with pytest.raises(ConfigError, match="no row has a learned token within 8 tokens"):
        perplexity(model, tokenizer, [cut], of="f", max_length=8)
    with pytest.raises(ConfigError, match="token id 99, but the model has 34 embeddings"):
        perplexity(model, tokenizer, [{"input_ids": [1, 99]}], of="f")


@pytest.mark.slow
def test_the_held_out_loss_of_a_training_run_comes_out_again(llama, tmp_path):
    """With the run's adapter; all held-out rows have one length, for which the Trainer's mean of batches is exact."""
    from flashbone.evaluate.run import Request, evaluate
    from flashbone.train.recipe import DataRecipe, Recipe
    from flashbone.train.run import train
    from helpers.tiny_llama import questions

    for name, rows in (("t", questions(24)), ("h", questions(32)[24:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = train(
        Recipe(
            model=str(llama),
            data=DataRecipe(str(tmp_path / "t.jsonl"), eval=str(tmp_path / "h.jsonl")),
            output=str(tmp_path / "run"),
            adapter={"r": 8, "init_weights": True},
            training={"max_steps": 3, "learning_rate": 1e-2, "disable_tqdm": True},
        )
    ).summary
    for merge in (False, True):
        results = evaluate(
            Request(str(llama), Path(summary_adapter(tmp_path)), merge=merge, perplexity=tmp_path / "h.jsonl")
        )
        (found,) = results.evaluations
        assert values(found)["loss (nats per token)"].value == pytest.approx(summary["eval_loss_after"], rel=1e-4)
        assert results.merged is merge
    (bare,) = evaluate(Request(str(llama), perplexity=tmp_path / "h.jsonl")).evaluations
    assert values(bare)["loss (nats per token)"].value == pytest.approx(summary["eval_loss_before"], rel=1e-4)
    assert summary["eval_loss_before"] - summary["eval_loss_after"] > 0.1


def summary_adapter(folder):
    return folder / "run" / "adapter"
