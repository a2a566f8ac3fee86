"""Exact match on a live model, against plain generate, one row at a time."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from flashbone.errors import ConfigError
from flashbone.evaluate.exact_match import answer_rows, exact_matches, make_prompt
from flashbone.train.data.makers import ALPACA

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "demo" / "smollm2"
TEXTS = [
    "where was the cat",
    "the",
    "the red dog ran under a big tree . where was it ?",
    "what did the small cat do where it sat on the mat ?",
    "yes no",
]


def plain_answers(model, tokenizer, texts, new):
    """Each text on its own, without padding, by transformers' generate."""
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=2, pad_token_id=0)
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        output = model.generate(**ids, generation_config=config)
        found.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_padded_on_the_left_give_what_single_rows_give(model, tokenizer, batch_size):
    results = exact_matches(model, tokenizer, [(t, "1") for t in TEXTS], max_new_tokens=9, batch_size=batch_size)
    assert [one.row for one in results] == list(range(5))
    assert [one.text for one in results] == plain_answers(model, tokenizer, TEXTS, 9)
    assert len({one.text for one in results}) > 2, "a model that always says the same would hide swapped rows"


def test_the_model_stops_at_its_end_token_and_what_follows_does_not_count(model, tokenizer):
    lame = copy.deepcopy(model)
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    said = model.generate(**ids, do_sample=False, max_new_tokens=9)[0, ids["input_ids"].shape[1] :].tolist()
    end = next(token for token in said[2:] if token not in said[:2])
    lame.generation_config.eos_token_id = [2, end]
    one, _ = exact_matches(lame, tokenizer, [(TEXTS[0], "1"), (TEXTS[2], "1")], max_new_tokens=9, batch_size=2)
    before = said.index(end)
    assert one.text == tokenizer.decode(said[:before], skip_special_tokens=True)
    assert one.tokens == before + 1 < 9


def test_a_models_own_sampling_and_penalties_are_not_used(model, tokenizer):
    moody = copy.deepcopy(model)
    moody.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.9, top_k=3, repetition_penalty=1.9, eos_token_id=2, pad_token_id=0
    )
    rows = [(text, "1") for text in TEXTS]
    assert exact_matches(moody, tokenizer, rows, max_new_tokens=9) == exact_matches(
        model, tokenizer, rows, max_new_tokens=9
    )


def test_going_on_decodes_what_is_left_in_the_same_batches(model, tokenizer):
    rows = [(text, "1") for text in TEXTS]
    whole = {one.row: one for one in answer_rows(model, tokenizer, rows, max_new_tokens=6, batch_size=2)}
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        rest = list(answer_rows(model, tokenizer, rows, max_new_tokens=6, batch_size=2, done={3, 0}))
    finally:
        handle.remove()
    assert sorted(one.row for one in rest) == [1, 2, 4]
    assert all(one == whole[one.row] for one in rest)
    assert max(shapes) == 2, "row 2 is decoded beside row 3 again"


def test_right_and_wrong_are_told_apart(model, tokenizer):
    (said,) = plain_answers(model, tokenizer, TEXTS[:1], 4)
    right, wrong = exact_matches(model, tokenizer, [(TEXTS[0], said), (TEXTS[0], "dog dog")], max_new_tokens=4)
    assert right.right
    assert not wrong.right
    assert right.answer == wrong.answer == said


def test_a_conversation_goes_through_the_chat_template(model, tokenizer):
    chat = make_prompt("where was it ?", chat=True)
    text = "<|user|> where was it ? </s><|assistant|> "
    talk, written = exact_matches(model, tokenizer, [(chat, "1"), (text, "1")], max_new_tokens=5)
    assert talk.text == written.text


def test_a_training_model_comes_back_as_it_was(model, tokenizer):
    model.train()
    try:
        model.config.use_cache = False  # as trainers do
        with_dropout = exact_matches(model, tokenizer, [(TEXTS[0], "1")], max_new_tokens=3)
        assert model.training
        assert torch.is_grad_enabled()
    finally:
        model.eval()
        model.config.use_cache = True
    assert with_dropout[0].text == plain_answers(model, tokenizer, TEXTS[:1], 3)[0]


def test_prompts_are_the_question_a_template_or_the_papers():
    assert make_prompt("1 + {1}?") == "1 + {1}?"
    assert make_prompt("1 + {1}?", "Q: {question}\nA:") == "Q: 1 + {1}?\nA:"
    assert make_prompt("1 + 1?", "alpaca") == ALPACA.format(instruction="1 + 1?")


def test_prompts_that_do_not_fit_are_named_before_anything_is_decoded(model, tokenizer):
    rows = [("the", "1"), ("the cat", "1")]
    with pytest.raises(ConfigError, match=r"row 1: its prompt of 2 tokens and 255 new ones .* 256 .* to 254"):
        exact_matches(model, tokenizer, rows, max_new_tokens=255)
    with pytest.raises(ConfigError, match="row 0: its prompt has no tokens"):
        exact_matches(model, tokenizer, [("", "1")])


@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs the model of `make demo`")
def test_a_real_models_answers_are_those_of_plain_generate():
    from flashbone.train.models import load_causal_lm
    from flashbone.train.tokenizers import load_tokenizer

    model, tokenizer = load_causal_lm(str(SMOLLM2), torch.float32), load_tokenizer(str(SMOLLM2))
    questions = ["What is 2 + 3?", "Tom has 3 red and 4 blue apples. How many apples has Tom?"]
    results = exact_matches(
        model, tokenizer, [(make_prompt(q, chat=True), "5") for q in questions], max_new_tokens=12, batch_size=2
    )
    for question, one in zip(questions, results, strict=True):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=12, do_sample=False)
        plain = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert one.text == plain
    assert results[0].right, "2 + 3 is within its powers"
