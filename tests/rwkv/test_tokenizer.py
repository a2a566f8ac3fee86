"""RwkvTokenizer beside the rwkv package's own trie, and what transformers asks of a tokenizer."""

import importlib.util
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer, PreTrainedConfig

from flashbone.rwkv import longest_match
from flashbone.rwkv.tokenizer import CHAT_TEMPLATE, RwkvTokenizer
from flashbone.rwkv.vocabulary import VOCABULARY_NAME, packaged_vocabulary, read_vocabulary, write_vocabulary

trie = pytest.importorskip("rwkv.rwkv_tokenizer", reason="the reference and the vocabulary are in the rwkv package")

BYTES = [bytes([byte]) for byte in range(256)]
TEXTS = [
    "",
    " ",
    "  leading and trailing  \t ",
    "The quick brown fox\r\njumps over\r\n\r\nthe lazy dog.\n\n\n",
    "def f(x):\n    return {'a': x ** 2}  # naïve café\n" * 9,
    "今天天气很好，我们去公园散步吧！「RWKV」是一种RNN。" * 12,  # noqa: RUF001
    "Привет, мир! שלום עולם العربية हिन्दी ไทย 한국어 日本語テキスト",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🇩🇪 ☺️ \U0001d518\U0001d52b 𠀀𪛖",
    "e\u0301 \u0301\u0302 a\u200db \u200b\u2028\u2029\x85\ufeff\ufffd \U0010ffff",
    "".join(map(chr, range(256))),
    "answer\x17 \x17\n\x17\x17 \x00\x00 nul",
    "=" * 300 + "-" * 81 + " " * 300 + "\n" * 50 + "\t" * 50,
]


class _Config(PreTrainedConfig):
    model_type = "rwkv_tokenizer_test"


@pytest.fixture(scope="module")
def reference():
    return trie.TRIE_TOKENIZER(str(packaged_vocabulary()))


@pytest.fixture(scope="module")
def tokenizer():
    return RwkvTokenizer()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A vocabulary with a few tokens besides the single bytes."""
    path = tmp_path_factory.mktemp("vocabulary") / "small.txt"
    write_vocabulary([b"", *BYTES, b"ab", b"abc", b" the", "é".encode(), "中文".encode(), b"\n\n", b" \xe4"], path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("short", [0, 256])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_encodes_as_the_rwkv_package_does(tokenizer, reference, monkeypatch, text, short):
    monkeypatch.setattr(longest_match, "_SHORT", short)
    want = reference.encode(text)
    assert tokenizer.encode(text) == want
    assert tokenizer(text)["input_ids"] == want
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == want
    assert tokenizer.decode(want) == text
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(want)) == text


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60))
def test_any_text_encodes_as_in_the_rwkv_package_and_comes_back(tokenizer, reference, text):
    want = reference.encode(text)
    match = tokenizer._match
    assert match.encode_bytes(text.encode()) == want
    assert [index for piece in match.cut(text) for index in match.encode_bytes(piece.encode())] == want
    assert tokenizer.encode(text, split_special_tokens=True) == want
    assert tokenizer.decode(want) == text


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_tokens_side_by_side_encode_as_in_the_rwkv_package(tokenizer, reference, data):
    match = tokenizer._match
    ids = data.draw(st.lists(st.integers(1, 65529), max_size=100))
    text = b"".join(match.tokens[index] for index in ids).decode("utf-8", "replace")
    want = reference.encode(text)
    assert match.encode(text) == want
    assert [index for piece in match.cut(text) for index in reference.encode(piece)] == want


def test_a_cut_character_decodes_to_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a𪛖")[:-1]) == "a\ufffd"
    assert tokenizer.decode([229]) == "\ufffd"


def test_rows_without_a_token_decode_to_the_replacement_character(tokenizer):
    assert tokenizer.decode([98, 65535, 99]) == "a\ufffdb"
    assert tokenizer.convert_ids_to_tokens([65530]) == ["\ufffd"]
    assert tokenizer.convert_tokens_to_ids("no such token") is None


def test_spaces_are_not_cleaned_up(tokenizer):
    text = " Hello , world ! It 's n't  "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.batch_decode([tokenizer.encode(text)]) == [text]


def test_every_id_has_a_str_of_its_own(tokenizer):
    ids = list(range(65530))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(set(tokens)) == 65530
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.get_vocab() == dict(zip(tokens, ids, strict=True))
    assert tokens[24] == "\x17"
    assert tokens[34550] == "hello"
    assert tokens[229] == "\\xe4"


def test_sizes_and_special_ids(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 65530
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 24, None)
    assert tokenizer.model_max_length > 1e29
    assert tokenizer("a").keys() == {"input_ids", "attention_mask"}


@pytest.mark.slow
def test_end_of_text_in_a_text_is_id_0_unless_special_tokens_are_split(tokenizer, reference):
    text = "one <|endoftext|> two<|endoftext|>"
    one, two = reference.encode("one "), reference.encode(" two")
    assert tokenizer.encode(text) == [*one, 0, *two, 0] == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    assert tokenizer.encode(text, split_special_tokens=True) == reference.encode(text)
    assert tokenizer.decode([*one, 0, *two, 0]) == text


@pytest.mark.slow
def test_end_of_answer_takes_no_space_along(tokenizer, reference):
    text = " a \x17 \n\x17\t\x17"
    assert tokenizer.encode(text) == reference.encode(text) == tokenizer.encode(text, split_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_skipped_where_asked(tokenizer):
    ids = [0, 0, *tokenizer.encode("Hi there\x17"), 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi there"
    assert tokenizer.decode(ids) == "<|endoftext|><|endoftext|>Hi there\x17<|endoftext|>"


def test_added_tokens_follow_the_vocabulary_and_are_found_in_texts(small):
    tokenizer = RwkvTokenizer(small)
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<a>", "<a><b>", "中文"]) == 2  # the vocabulary has the third
    assert len(tokenizer) == size + 2
    text = "x<a>y<a><b> 中文中<|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids[:5] == [ord("x") + 1, size, ord("y") + 1, size + 1, ord(" ") + 1]
    assert ids == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    assert tokenizer.decode(ids) == text


def test_added_tokens_that_strip_are_left_to_transformers(small):
    tokenizer = RwkvTokenizer(small)
    tokenizer.add_tokens([AddedToken("<s>", lstrip=True, rstrip=True)])
    ids = tokenizer.encode("ab <s> ab")
    assert tokenizer.decode(ids) == "ab<s>ab"


def test_another_end_token_is_found_in_texts(small):
    tokenizer = RwkvTokenizer(small, eos_token="\n\n")
    assert tokenizer.eos_token_id == 262
    assert tokenizer.encode("a\n\n\n") == [98, 262, 11]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_that_is_asked_for(tokenizer, side):
    batch = tokenizer(["a b c", "", "hello"], padding=True, padding_side=side, return_tensors="pt")
    hello, mask = ([0, 0, 34550], [0, 0, 1]) if side == "left" else ([34550, 0, 0], [1, 0, 0])
    assert batch["input_ids"].tolist() == [[98, 333, 334], [0, 0, 0], hello]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], mask]


@pytest.mark.parametrize(("side", "want"), [("right", [98, 333]), ("left", [333, 334])])
def test_truncation(tokenizer, monkeypatch, side, want):
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    assert tokenizer("a b c", truncation=True, max_length=2)["input_ids"] == want
    assert tokenizer(["a b c", "a"], truncation=True, max_length=2)["input_ids"] == [want, [98]]


def test_all_kinds_of_input(tokenizer):
    assert tokenizer("a", " b")["input_ids"] == [98, 333]
    assert tokenizer(["a", ""], [" b", " c"])["input_ids"] == [[98, 333], [334]]
    assert tokenizer([("a", " b"), ("", " c")])["input_ids"] == [[98, 333], [334]]
    assert tokenizer(["a", " b c"], is_split_into_words=True)["input_ids"] == [98, 333, 334]
    assert tokenizer([98, 333])["input_ids"] == [98, 333]
    assert tokenizer("a", text_target=" b")["labels"] == [333]
    with pytest.raises(ValueError, match="must be a string"):
        tokenizer(3)


@pytest.mark.slow
def test_saved_folders_load_without_the_rwkv_package(tokenizer, reference, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "RwkvTokenizer"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loaded = RwkvTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert loaded.chat_template == CHAT_TEMPLATE
    assert all(loaded.encode(text) == reference.encode(text) for text in TEXTS)


def test_auto_tokenizer_takes_the_class_that_a_folder_names(small, tmp_path):
    RwkvTokenizer(small).save_pretrained(tmp_path)
    AutoTokenizer.register(_Config, RwkvTokenizer, exist_ok=True)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is RwkvTokenizer


def test_what_was_changed_is_saved_along(small, tmp_path):
    tokenizer = RwkvTokenizer(small, padding_side="left", model_max_length=99)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = "x"
    tokenizer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = RwkvTokenizer.from_pretrained(tmp_path)
    assert (loaded.padding_side, loaded.model_max_length, loaded.chat_template) == ("left", 99, "x")
    assert loaded.bos_token_id == tokenizer.bos_token_id == len(loaded) - 1
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert RwkvTokenizer.from_pretrained(tmp_path / VOCABULARY_NAME).encode("abc") == [258]


def test_a_folder_may_name_id_0_otherwise(small, tmp_path):
    write_vocabulary(read_vocabulary(small), tmp_path / VOCABULARY_NAME)
    name = "<|rwkv_tokenizer_end_of_text|>"
    added = {"0": {"content": name, "special": True, "normalized": False}}
    config = {"added_tokens_decoder": added, "eos_token": "\n\n", "unk_token": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "RwkvTokenizer"}))
    tokenizer = RwkvTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 262, 264)
    assert tokenizer.encode(f"a{name}") == [98, 0]
    assert len(tokenizer.encode("<|endoftext|>")) == 13


def test_pickles_hold_no_memory_of_texts(small):
    tokenizer = RwkvTokenizer(small)
    before = pickle.dumps(tokenizer)
    tokenizer.encode("some words " * 99)
    assert pickle.dumps(tokenizer) == before
    assert pickle.loads(before).encode(" the 中文") == tokenizer.encode(" the 中文")


CHAT = [
    {"role": "system", "content": "  Be brief.\n\n\n\nBe kind.\n"},
    {"role": "user", "content": "Hi\r\n\r\nthere"},
    {"role": "assistant", "content": "Hello!\n  - one\n\n  - two"},
    {"role": "user", "content": " And? "},
]
RENDERED = (
    "System: Be brief.\nBe kind.\n\nUser: Hi\nthere\n\nAssistant: Hello!\n  - one\n  - two\n\nUser: And?\n\nAssistant:"
)


@pytest.mark.slow
def test_chats_take_rwkvs_format(tokenizer, reference):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == reference.encode(RENDERED)


def test_a_prompt_is_the_beginning_of_the_whole_chat(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    whole = [*CHAT, {"role": "assistant", "content": "Fine."}]
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]) == " Fine.\n\n"


def test_other_roles_are_refused(tokenizer):
    with pytest.raises(Exception, match="the roles system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
