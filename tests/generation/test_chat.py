"""A conversation: what it answers is what plain generate answers to all of it, whatever it kept in memory."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from flashbone import BoneConfig
from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.evaluate.loading import load_language_model
from flashbone.generation.chat import Chat
from flashbone.generation.speaker import Model, load_speaker, named
from flashbone.rwkv import from_pth
from flashbone.train.data.loading import load_data
from flashbone.train.decoding import Decoding
from flashbone.train.recipe import DataRecipe, Recipe
from helpers.comparison import close
from helpers.rwkv import write_rwkv

QUESTIONS = ["where was the cat ?", "and the dog ?", "what did it do on the mat ?"]
FEW = Decoding(9)


@pytest.fixture(scope="module")
def speaker(llama, adapters):
    return load_speaker(Model(str(llama), tuple(map(str, adapters.values())), device="cpu"))


def say(chat, text) -> str:
    words = []
    chat.say(text, words.append)
    return "".join(words)


@functools.cache
def loaded(llama, adapter):
    return load_language_model(str(llama), adapter, torch.float32, "cpu")


def plain(llama, adapter, messages, new=9) -> str:
    """The answer of transformers' generate to a whole conversation, without any memory."""
    model, tokenizer = loaded(llama, adapter)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", [None, "first", "second"])
def test_each_turn_answers_the_whole_conversation_and_reads_only_what_is_new(llama, adapters, speaker, name):
    chat, tokenizer = Chat(speaker, FEW, name, system="big yes"), speaker.tokenizer
    processed = []
    for question in QUESTIONS:
        before = [*chat.messages, {"role": "user", "content": question}]
        assert say(chat, question) == plain(llama, adapters.get(name), before) == chat.turns[-1]["content"]
        length = len(tokenizer.apply_chat_template(before, add_generation_prompt=True)["input_ids"])
        processed.append((chat.processed, length))
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 3
    assert chat.messages[0] == {"role": "system", "content": "big yes"}
    assert processed[0] == (12, 12)
    # Tokens that text leaves out, as <unk>, make an answer's own tokens new; the question before it never is.
    assert all(new <= length - 12 for new, length in processed[1:])


def test_another_adapter_answers_from_the_next_question_on(llama, adapters, speaker):
    chat = Chat(speaker, FEW, "first")
    say(chat, QUESTIONS[0])
    for name in ("second", None):
        chat.use(name)
        before = [*chat.messages, {"role": "user", "content": QUESTIONS[1]}]
        assert say(chat, QUESTIONS[1]) == plain(llama, adapters.get(name), before)
    with pytest.raises(ConfigError, match="adapter third: no such name; there are first, second, and off"):
        chat.use("third")
    chat.reset()
    assert chat.turns == []
    assert say(chat, QUESTIONS[0]) == plain(llama, None, [{"role": "user", "content": QUESTIONS[0]}])


def test_a_comparison_asks_all_and_leaves_the_conversation_as_it_was(llama, adapters, speaker):
    chat = Chat(speaker, FEW, "first")
    with pytest.raises(ConfigError, match="there is no question yet"):
        list(chat.compare())
    say(chat, QUESTIONS[0])
    turns = list(chat.turns)
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    want = [("base", plain(llama, None, asked))] + [(name, plain(llama, adapters[name], asked)) for name in adapters]
    assert list(chat.compare()) == want
    assert len({answer for _, answer in want}) == 3
    after = [*turns, {"role": "user", "content": QUESTIONS[1]}]
    assert list(chat.compare(QUESTIONS[1]))[1] == ("first", plain(llama, adapters["first"], after))
    assert chat.turns == turns
    assert say(chat, QUESTIONS[1]) == plain(llama, adapters["first"], after)


def test_sampling_follows_its_seed_and_greedy_needs_none(speaker):
    sampled = Decoding(20, temperature=2.0, top_k=20, seed=3)
    answers = {say(Chat(speaker, replace(sampled, seed=seed)), QUESTIONS[0]) for seed in (3, 3, 4)}
    assert len(answers) == 2
    base, *_ = Chat(speaker, sampled).compare(QUESTIONS[0])
    assert base == next(Chat(speaker, sampled).compare(QUESTIONS[0]))


def test_a_saved_conversation_is_a_row_to_train_on(speaker, tmp_path):
    chat = Chat(speaker, FEW, "first")
    with pytest.raises(ConfigError, match="nothing has been said yet"):
        chat.save(tmp_path / "talk.jsonl")
    say(chat, QUESTIONS[0])
    chat.save(tmp_path / "talk.jsonl")
    data = load_data(Recipe("m", DataRecipe(str(tmp_path / "talk.jsonl"), eval=None), "o"))
    assert json.loads(data.train[0]["conversation"])["messages"] == chat.messages
    kept = (tmp_path / "talk.jsonl").read_bytes()
    with pytest.raises(FlashboneError, match="exists already"):
        chat.save(tmp_path / "talk.jsonl")
    assert (tmp_path / "talk.jsonl").read_bytes() == kept


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(llama, speaker):
    chat, words = Chat(speaker, FEW), []

    def stop(text):
        words.append(text)
        if len(words) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say(QUESTIONS[0], stop)
    first = chat.turns[-1]["content"]
    assert first.startswith("".join(words[:3]).strip())
    assert 0 < len(first) < len(plain(llama, None, [chat.turns[0]]))
    before = [*chat.messages, {"role": "user", "content": QUESTIONS[1]}]
    assert say(chat, QUESTIONS[1]) == plain(llama, None, before)


def test_a_conversation_that_fills_the_model_is_refused_and_can_be_reset(speaker):
    chat = Chat(speaker, Decoding(500))
    say(chat, "the " * 40)
    say(chat, "the " * 40)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, and the model sees 256; /reset begins a new one"):
        say(chat, "the " * 140)
    assert chat.turns[-1]["role"] == "assistant", "the question that was refused is no turn"
    chat.reset()
    assert say(chat, QUESTIONS[0])


def test_a_question_without_an_answer_is_no_turn(speaker, monkeypatch):
    chat = Chat(speaker, FEW)
    monkeypatch.setattr(speaker, "stops", list(range(len(speaker.tokenizer))))
    assert say(chat, QUESTIONS[0]) == ""
    assert chat.turns == []
    assert [answer for _, answer in chat.compare(QUESTIONS[0])] == ["", "", ""]


def test_what_the_template_refuses_is_an_error_and_no_turn(speaker, monkeypatch):
    template = "{{ raise_exception('no system prompts') if messages[0].role == 'system' }}{{ messages[-1].content }}"
    monkeypatch.setattr(speaker.tokenizer, "chat_template", template)
    chat = Chat(speaker, FEW, system="yes")
    with pytest.raises(FormatError, match="no system prompts"):
        say(chat, "the")
    assert chat.turns == []
    chat.system = None
    assert say(chat, "the")


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy(speaker, monkeypatch):
    monkeypatch.setattr(speaker.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template; give one with --chat-template"):
        Chat(speaker, FEW)


def test_adapters_are_called_by_what_tells_them_apart(tmp_path):
    for name in ("runs/one/adapter", "runs/two/adapter", "other/one", "off"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "x.pth").touch()
    given = [str(tmp_path / name) for name in ("runs/one/adapter", "runs/two/adapter", "other/one", "off", "x.pth")]
    assert list(named([*given, f"mine={tmp_path}/off"])) == ["one", "two", "one-2", "off-2", "x", "mine"]
    for wrong in ([f"off={tmp_path}"], [f"a={tmp_path}", f"a={tmp_path}/off"]):
        with pytest.raises(ConfigError, match=r"the name .* is taken"):
            named(wrong)
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        named(["nowhere"])


@pytest.mark.parametrize(("version", "is_adapted"), [(7, False), (7, True), (6, False)])
@pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning")
def test_rwkv_keeps_its_state_so_a_turn_costs_the_same_however_long_the_talk_is(tmp_path, version, is_adapted):
    base = write_rwkv(tmp_path / "base.pth", version, vocabulary=260, layers=2)
    (tmp_path / "bytes.txt").write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    name = base
    if is_adapted:
        name = tmp_path / "mine"
        config = BoneConfig(r=8, target_modules=["key", "value"], init_weights=False)
        get_peft_model(from_pth(base), config).save_pretrained(name)
    speaker = load_speaker(Model(str(name), vocabulary=str(tmp_path / "bytes.txt"), device="cpu"))
    assert speaker.is_rwkv
    assert list(speaker.keys) == ["mine"] * is_adapted
    speaker.stops.clear()  # random numbers may end at once
    chat, seen = Chat(speaker, Decoding(6), next(iter(speaker.keys), None)), []
    for _ in range(5):
        said = say(chat, "How are you?")
        assert chat.turns[-1]["content"] == said
        seen.append((chat.processed, len(chat.memory.ids)))
    assert len(set(seen[1:])) == 1
    assert seen[0][0] <= seen[1][0] < 40


@pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning")
def test_a_state_has_seen_what_was_said_token_by_token(tmp_path, monkeypatch):
    base = write_rwkv(tmp_path / "base.pth", 7, vocabulary=260, layers=2)
    (tmp_path / "bytes.txt").write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    speaker = load_speaker(Model(str(base), vocabulary=str(tmp_path / "bytes.txt"), device="cpu"))
    speaker.stops.clear()
    chat, fed = Chat(speaker, Decoding(6)), []
    stream = speaker.stream

    def recorded(ids, adapter, decoding, writing, past):
        before = past.get_seq_length()
        assert before == 0
        past = stream(ids, adapter, decoding, writing, past)
        fed.extend([*ids, *writing.ids][: past.get_seq_length()])
        return past

    monkeypatch.setattr(speaker, "stream", recorded)
    for question in ("Hm?", "Yes.", "No!"):
        say(chat, question)
    text = speaker.tokenizer.decode(fed)
    assert text.startswith("User: Hm?\n\nAssistant:")
    assert "\n\nUser: Yes.\n\nAssistant:" in text
    with torch.no_grad():
        want = speaker.model(torch.tensor([fed]), use_cache=True).past_key_values
    for ours, theirs in zip(chat.memory.past.layers, want.layers, strict=True):
        assert close(ours.wkv, theirs.wkv, torch.float32)
