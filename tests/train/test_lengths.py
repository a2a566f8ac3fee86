"""Rows are cut at what model and tokenizer take; what is lost by that is counted, and too much of it refused."""

import json

import pytest
from training_runs import recipe_for

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate.classification import classification
from flashbone.evaluate.perplexity import perplexity
from flashbone.train.lengths import fitting_length
from flashbone.train.run import train
from helpers.tiny_llama import questions, write_tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]

LONG = {"prompt": "where was the big cat ?", "completion": " on the mat . yes it sat" * 4}


def config_of(kind, **fields):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **fields)


@pytest.mark.parametrize(
    ("config", "of_tokenizer", "asked", "want"),
    [
        (config_of("gpt2", n_positions=64), None, None, 64),
        (config_of("gpt2", n_positions=64), 10**30, 32, 32),
        (config_of("bert", max_position_embeddings=128), None, None, 128),
        (config_of("roberta", max_position_embeddings=130, pad_token_id=1), None, None, 128),
        (config_of("xlm-roberta", max_position_embeddings=130, pad_token_id=1), 99, None, 99),
        (config_of("t5"), None, None, 512),
        (config_of("deberta-v2", max_position_embeddings=64, position_biased_input=False), None, None, 512),
        (config_of("llama", max_position_embeddings=4096), 2048, None, 512),
        (None, None, 4096, 4096),
    ],
)
def test_a_length_is_what_was_asked_for_within_what_model_and_tokenizer_take(config, of_tokenizer, asked, want):
    assert fitting_length(asked, 512, config, of_tokenizer, "max_length") == want


def test_a_larger_length_is_refused_by_training_and_evaluation_alike(llama, questions_file, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with pytest.raises(
        ConfigError, match=r"training\.max_length: got 257, but the model's positions are 256; lower it"
    ):
        train(recipe_for(llama, questions_file, tmp_path / "run", training={"max_length": 257}))
    assert not (tmp_path / "run").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    with pytest.raises(ConfigError, match="max_length: got 257, but the model's positions are 256; lower it"):
        perplexity(model, tokenizer, [{"text": "the cat"}], max_length=257)
    tokenizer.model_max_length = 100
    with pytest.raises(ConfigError, match="max_length: got 101, but the tokenizer's model_max_length is 100"):
        classification(model, tokenizer, [{"text": "the cat", "label": "a"}], ["a", "b"], max_length=101)


def test_a_tokenizers_own_limit_counts(questions_file, tmp_path):
    model = write_tiny_llama(tmp_path / "base")
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 64}))
    with pytest.raises(ConfigError, match="got 65, but the tokenizer's model_max_length is 64"):
        train(recipe_for(model, questions_file, tmp_path / "run", training={"max_length": 65}))


@pytest.mark.parametrize("text", [False, True])
def test_cut_rows_and_lost_ends_are_counted_before_the_first_step(llama, jsonl, tmp_path, caplog, text):
    rows = [*questions(6), LONG, LONG, {"prompt": "where was the cat ? " * 12, "completion": " yes"}]
    rows = [{"text": row["prompt"] + row["completion"]} for row in rows] if text else rows
    recipe = recipe_for(llama, jsonl(rows), tmp_path / "run", training={"max_steps": 1, "max_length": 20})
    recipe.data.eval = None
    with caplog.at_level("INFO", logger="flashbone"):
        train(recipe)
    want = (
        f"of 9 training rows 3 are cut at training.max_length 20; 3 answers lose their end, and {0 if text else 1} rows"
    )
    assert want in caplog.text


def test_more_than_half_of_the_rows_are_cut_only_when_that_is_allowed(llama, jsonl, tmp_path):
    recipe = recipe_for(llama, jsonl([*questions(2), LONG, LONG, LONG]), tmp_path / "run", training={"max_steps": 1})
    recipe.data.eval, recipe.training["max_length"] = None, 20
    with pytest.raises(ConfigError, match=r"max_length 20 cuts 3 of 5 training rows.*data\.allow_cut: true") as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    recipe.data.allow_cut = True
    assert train(recipe).summary["steps"] == 1


def test_a_token_that_only_the_tokenizer_got_is_refused_by_its_row(jsonl, tmp_path):
    from transformers import AutoTokenizer

    model = write_tiny_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    path = jsonl([*questions(4), "", {"prompt": "the <new> cat", "completion": " sat"}])
    with pytest.raises(FormatError, match=r"rows\.jsonl:6: holds the token id 34 \('<new>'\), but the model has 34"):
        train(recipe_for(model, path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
