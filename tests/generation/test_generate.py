"""Rows with their answers: one for one, in order, from every layout, by the adapter that a row names."""

import functools
import json

import pytest
import torch

from flashbone.errors import ConfigError, FormatError
from flashbone.evaluate.exact_match import exact_matches, make_prompt
from flashbone.evaluate.loading import load_language_model
from flashbone.generation.rows import read_asked
from flashbone.generation.run import Prompts, generate
from flashbone.generation.speaker import Model, Speaker
from flashbone.train.data.makers import ALPACA
from flashbone.train.decoding import Decoding

FEW = Decoding(7, seed=0)


@functools.cache
def loaded(llama, adapter):
    return load_language_model(str(llama), adapter, torch.float32, "cpu")


def answers(llama, adapter, prompts) -> list[str]:
    """What plain exact match has the model write."""
    model, tokenizer = loaded(llama, adapter)
    return [row.text for row in exact_matches(model, tokenizer, [(p, "-") for p in prompts], max_new_tokens=7)]


def model_of(llama, adapters) -> Model:
    return Model(str(llama), tuple(map(str, adapters.values())), device="cpu")


@pytest.mark.parametrize("mixed", [True, False])
def test_rows_choose_their_adapter_and_come_back_in_order(llama, adapters, jsonl, monkeypatch, mixed):
    texts = ["the", "where was the small cat ?", "yes no yes", "what did it do ?", "a dog"]
    names = ["second", None, "first", "second", None]
    rows = [{"id": n, "prompt": text, "adapter": name} for n, (text, name) in enumerate(zip(texts, names, strict=True))]
    if not mixed:
        monkeypatch.setattr(Speaker, "mixes", False)
    got = generate(Prompts(model_of(llama, adapters), jsonl(rows), decoding=FEW, batch_size=3))
    assert [{name: row[name] for name in ("id", "prompt", "adapter")} for row in got] == rows
    for row in got:
        (want,) = answers(llama, adapters.get(row["adapter"]), [make_prompt(row["prompt"], chat=True)])
        assert row["generated"] == want
        assert 1 <= row["generated_tokens"] <= 7
    assert len({row["generated"] for row in got}) > 2


CHAT = [{"role": "user", "content": "where was it ?"}, {"role": "assistant", "content": "on the mat"}]
LAYOUTS = {
    "prompt": ({"prompt": "the cat"}, [{"role": "user", "content": "the cat"}]),
    "prompt and completion": ({"prompt": "the cat", "completion": "sat"}, [{"role": "user", "content": "the cat"}]),
    "turns": ({"prompt": CHAT[:1]}, CHAT[:1]),
    "messages": ({"messages": CHAT[:1]}, CHAT[:1]),
    "messages with the answer": ({"messages": CHAT}, CHAT[:1]),
    "messages that go on": ({"messages": [*CHAT, CHAT[0]]}, [*CHAT, CHAT[0]]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "where was it ?"}]}, CHAT[:1]),
    "question": ({"question": "the cat"}, [{"role": "user", "content": "the cat"}]),
    "context": ({"question": "the cat", "context": "a tree"}, [{"role": "user", "content": "a tree\n\nthe cat"}]),
    "alpaca": ({"instruction": "the cat"}, ALPACA.format(instruction="the cat")),
    "text": ({"text": "the cat sat"}, "the cat sat"),
    "system": (
        {"messages": [{"role": "system", "content": "big"}, CHAT[0]]},
        [{"role": "system", "content": "big"}, CHAT[0]],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_that_training_reads_is_asked_up_to_its_answer(llama, jsonl, name):
    from transformers import AutoTokenizer

    row, want = LAYOUTS[name]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    (asked,) = read_asked(jsonl([row]), [])
    if isinstance(want, list):
        want = tokenizer.apply_chat_template(want, tokenize=False, add_generation_prompt=True)
    assert asked.ids(tokenizer, None, True) == tokenizer(want)["input_ids"]
    assert asked.row == row


def test_a_system_prompt_and_plain_texts(llama, jsonl):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    plain, talk = read_asked(jsonl([{"prompt": "the cat"}, {"prompt": CHAT[:1]}]), [])
    assert plain.ids(tokenizer, None, False) == tokenizer("the cat")["input_ids"]
    for row in (plain, talk):
        assert tokenizer.decode(row.ids(tokenizer, "big", True)).startswith("<|system|> big </s>")
    with pytest.raises(FormatError, match="which has no system prompt; leave out --system"):
        plain.ids(tokenizer, "big", False)
    tokenizer.chat_template = None
    with pytest.raises(FormatError, match=r"rows.jsonl:2: is a conversation, but the tokenizer has no chat template"):
        talk.ids(tokenizer, None, True)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "adapter": "third"}], r":1: 'adapter' is 'third'; wanted 'first' or 'second' or null"),
        ([{"prompt": "a", "adapter": None}, {"prompt": "a"}], r":2: has no column 'adapter', and there are several"),
        ([{"prompt": "a", "adapter": 3}], r":1: 'adapter' is of type int"),
        ([{"prompt": "a", "adapter": None, "generated": "b"}], "has a column 'generated' already"),
        ([{"prompt": "", "adapter": None}], r":1: 'prompt' is empty; text was wanted"),
        ([{"adapter": None, "ask": "a"}], "hold no prompt; wanted one of messages, conversations, instruction, prompt"),
        ([{"prompt": "a", "adapter": None}, "{", "[]"], r":2: not valid JSON.*; .*:3: holds a list"),
        ([{"prompt": "a", "adapter": None, "documents": ["b"]}], "does not read 'documents'"),
        ([], "no rows"),
    ],
)
def test_rows_that_cannot_be_asked_are_named_before_anything_is_written(llama, adapters, jsonl, tmp_path, rows, said):
    out = tmp_path / "out.jsonl"
    with pytest.raises((FormatError, ConfigError), match=said):
        generate(Prompts(model_of(llama, adapters), jsonl(rows), output=out, decoding=FEW))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_prompt_that_leaves_no_room_is_named_and_nothing_is_left(llama, jsonl, tmp_path):
    request = Prompts(Model(str(llama), device="cpu"), jsonl([{"prompt": "the"}]), output=tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match=r"row 0: its prompt of 4 tokens and 512 new ones .* lower max_new_tokens"):
        generate(request)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_columns_are_renamed_and_kept(llama, jsonl):
    (asked,) = read_asked(jsonl([{"ask": "the cat", "id": 3}]), [], {"prompt": "ask"})
    assert (asked.text, asked.row) == ("the cat", {"ask": "the cat", "id": 3})
    with pytest.raises(ConfigError, match="columns: prompt=gone"):
        read_asked(jsonl([{"ask": "the cat"}]), [], {"prompt": "gone"})


def test_a_single_prompt_needs_a_single_adapter(llama, adapters):
    first = {"first": adapters["first"]}
    (row,) = generate(Prompts(model_of(llama, first), prompt="the cat", decoding=FEW))
    assert [row["generated"]] == answers(llama, adapters["first"], [make_prompt("the cat", chat=True)])
    with pytest.raises(ConfigError, match="which adapter is to answer, first or second"):
        generate(Prompts(model_of(llama, adapters), prompt="the cat"))
    with pytest.raises(ConfigError, match="a file of prompts or one prompt, and not both"):
        Prompts(model_of(llama, adapters))


def test_sampling_is_the_same_for_the_same_seed(llama, jsonl):
    file = jsonl([{"prompt": "the"}] * 4)

    def sampled(seed, **fields):
        decoding = Decoding(12, seed=seed, **fields)
        rows = generate(Prompts(Model(str(llama), device="cpu"), file, decoding=decoding, batch_size=2))
        return [row["generated"] for row in rows]

    assert sampled(1, temperature=3.0) == sampled(1, temperature=3.0) != sampled(2, temperature=3.0)
    assert len(set(sampled(1, temperature=3.0))) > 1
    assert sampled(1, top_k=1) == sampled(1) == sampled(2, temperature=0.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"temperature": -1.0}, "temperature: got -1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0.0}, "top_p: got 0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"temperature": 0.0, "top_k": 3}, "leave top_p and top_k out"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        Decoding(**fields)


def test_an_output_is_finished_gone_on_with_or_refused(llama, jsonl, tmp_path):
    file, out = jsonl([{"prompt": "the"}, {"prompt": "a cat"}]), tmp_path / "out.jsonl"
    request = Prompts(Model(str(llama), device="cpu"), file, output=out, decoding=FEW, batch_size=1)
    rows = generate(request)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert [path.name for path in (tmp_path / "out.jsonl.run").iterdir()] == ["settings.json"]
    stamp = out.stat().st_mtime_ns
    assert generate(request) == rows
    assert out.stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="holds generated rows with other settings: decoding was"):
        generate(Prompts(Model(str(llama), device="cpu"), file, output=out, decoding=Decoding(8)))
    file.write_text('{"prompt": "the"}\n')
    with pytest.raises(ConfigError, match=r"contents of .*rows.jsonl was"):
        generate(request)
    out.unlink()
    assert len(generate(request)) == 1, "an output that was removed is made anew"
    (tmp_path / "mine.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"mine.jsonl: exists already; name a new one"):
        generate(Prompts(Model(str(llama), device="cpu"), file, output=tmp_path / "mine.jsonl"))
    assert (tmp_path / "mine.jsonl").read_text() == "mine\n"
