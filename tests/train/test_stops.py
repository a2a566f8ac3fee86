"""From rows of ten layouts to merged models that give the learned answer and stop by themselves."""

import json

import pytest
import torch
from layout_rows import LAYOUT_ROWS
from training_runs import recipe_for

from flashbone.errors import ConfigError
from flashbone.train.data.formats import open_examples
from flashbone.train.data.tokens import tokenise
from flashbone.train.run import train
from helpers.tiny_llama import CHAT, byte_tokenizer, write_tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]

LAYOUTS = [
    "text",
    "prompt and completion",
    "context, question, answer",
    "Dolly",
    "Alpaca",
    "messages",
    "messages with weights",
    "messages with tools",
    "ShareGPT with system and tools",
    "prompt and completion of turns",
]


@pytest.fixture(scope="module")
def other_end(tmp_path_factory):
    """A model whose generation stops at <s>, while its tokenizer and template end answers in </s>."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("base"), byte_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "generation_config.json"  # as Llama 2 came, which transformers reads and does not write
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"temperature": 0.9, "do_sample": False}))
    return folder


def answer_of(folder, prompt: list[int]) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
    return made[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_merged_model_answers_and_stops_by_itself(name, other_end, jsonl, tmp_path):
    row = LAYOUT_ROWS[name].row
    training = {"max_steps": 150, "learning_rate": 1e-2, "save_strategy": "no", "per_device_train_batch_size": 2}
    recipe = recipe_for(other_end, jsonl([row] * 2), tmp_path / "run", training=training, merge=True)
    recipe.data.eval, recipe.adapter = None, {"r": 32}
    train(recipe)
    (example,) = open_examples(iter([("d:1", row)]), "sft", "d").examples
    (made,) = tokenise(example, byte_tokenizer())
    start = max(1, made.learned.index(True))
    end = made.ends[0]
    assert made.ids[end - 1] == 2
    assert answer_of(tmp_path / "run" / "merged", made.ids[:start]) == made.ids[start:end]


@pytest.mark.slow
def test_a_run_says_where_generation_did_not_stop_and_writes_both_ends(other_end, jsonl, tmp_path, caplog):
    recipe = recipe_for(other_end, jsonl([LAYOUT_ROWS["messages"].row] * 2), tmp_path / "run", merge=True)
    recipe.data.eval, recipe.training["max_steps"] = None, 1
    with caplog.at_level("INFO", logger="flashbone"):
        train(recipe)
    assert "answers end in </s>, but generation stops at <s>" in caplog.text
    for folder in ("adapter", "merged"):
        ends = json.loads((tmp_path / "run" / folder / "generation_config.json").read_text())["eos_token_id"]
        assert sorted(ends) == [1, 2]


def test_where_generation_stops_already_nothing_is_written(llama, questions_file, tmp_path, caplog):
    with caplog.at_level("INFO", logger="flashbone"):
        train(recipe_for(llama, questions_file, tmp_path / "run", training={"max_steps": 1, "save_strategy": "no"}))
    assert "generation stops" not in caplog.text
    assert not (tmp_path / "run" / "adapter" / "generation_config.json").exists()


def test_answers_without_an_end_are_refused_with_the_remedy(jsonl, tmp_path):
    model = write_tiny_llama(tmp_path / "base", CHAT.replace(" </s>", " "))
    rows = [{"messages": [{"role": "user", "content": "was it red ?"}, {"role": "assistant", "content": "yes"}]}] * 4
    recipe = recipe_for(model, jsonl(rows), tmp_path / "run")
    recipe.data.eval = None
    with pytest.raises(ConfigError, match=r"4 of 4 answers end in no token .*\{\{ eos_token \}\}") as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
