"""Rows of preferences: how those of well-known data sets are read, what is left out, and what is refused."""

import json

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.formats import choose_format, open_examples
from flashbone.train.data.layouts import FORMATS
from flashbone.train.data.prepared import Limits, prepare
from flashbone.train.data.tokens import IGNORED
from helpers.tiny_llama import byte_tokenizer

ASK, GOOD, BAD = "where was the cat ?", "on the mat .", "no ."


def talk(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


TURN = {"role": "assistant", "content": GOOD}
PAIRS = {
    "texts": ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, "preference"),
    "the prompt again in both": ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, "preference"),
    "an implicit prompt": ({"chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}"}, "preference"),
    "messages": ({"prompt": talk(ASK), "chosen": [TURN], "rejected": [{**TURN, "content": BAD}]}, "preference"),
    "UltraFeedback": (
        {"prompt": ASK, "prompt_id": "7", "chosen": talk(ASK, GOOD), "rejected": talk(ASK, BAD)}
        | {"messages": talk(ASK, GOOD), "score_chosen": 8.0, "score_rejected": 5.0},
        "preference",
    ),
    "hh-rlhf": (
        {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}"},
        "preference",
    ),
    "Orca": ({"system": "be short .", "question": ASK, "chosen": GOOD, "rejected": BAD}, "preference"),
    "Argilla": (
        {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD, "chosen_avg_rating": 5},
        "preference",
    ),
    "Argilla's Orca": ({"system": "", "input": ASK, "chosen": GOOD, "rejected": BAD}, "preference"),
    "LLaMA-Factory": (
        {"conversations": [{"from": "human", "value": ASK}], "chosen": {"from": "gpt", "value": GOOD}}
        | {"rejected": {"from": "gpt", "value": BAD}},
        "preference",
    ),
    "OpenAI": (
        {"input": {"messages": talk(ASK)}, "preferred_output": [TURN], "non_preferred_output": talk("", BAD)[1:]},
        "preference",
    ),
    "ms-swift": ({"messages": talk(ASK, GOOD), "rejected_response": BAD}, "messages-rejected_response"),
    "HelpSteer2": (
        {"prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2},
        "responses-strength",
    ),
    "HelpSteer3": (
        {"context": talk(ASK), "response1": GOOD, "response2": BAD, "overall_preference": -1},
        "responses-strength",
    ),
    "SafeRLHF": (
        {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        "responses-better",
    ),
    "arena": (
        {"conversation_a": talk(ASK, GOOD), "conversation_b": talk(ASK, BAD), "winner": "model_a"},
        "conversations-winner",
    ),
    "CSV": ({"prompt": ASK, "chosen": json.dumps([TURN]), "rejected": json.dumps(talk("", BAD)[1:])}, "preference"),
}  # fmt: skip


def examples_of(*rows, task="dpo", **settings):
    reading = open_examples(iter([(f"d:{n}", row) for n, row in enumerate(rows, 1)]), task, "d", **settings)
    return list(reading.examples), reading


def tokens_of(examples):
    from datasets import Dataset

    tokenizer = byte_tokenizer()
    made, counts = prepare(Dataset.from_list(examples), tokenizer, Limits())
    return made, counts, tokenizer


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_two_answers_to_the_same_prompt(name):
    row, format = PAIRS[name]
    assert choose_format(row, "dpo", "d")[0] == choose_format(row, "reward", "d")[0] == format
    examples, _ = examples_of(row)
    made, counts, tokenizer = tokens_of(examples)
    assert not counts.problems
    texts = {}
    for kind, ids, labels in (("chosen", "input_ids", "labels"), ("rejected", "rejected_ids", "rejected_labels")):
        start = sum(label == IGNORED for label in made[0][labels])
        texts[kind] = [tokenizer.decode(part) for part in (made[0][ids][:start], made[0][ids][start:])]
    prompt, chosen = texts["chosen"]
    assert texts["rejected"][0] == prompt
    assert prompt.count(ASK) == 1
    assert ("be short ." in prompt) == (name == "Orca")
    assert chosen.replace("</s>", "").strip() == GOOD
    assert texts["rejected"][1].replace("</s>", "").strip() == BAD
    assert chosen.endswith("</s>")


@pytest.mark.parametrize("label", [True, False, 1, 0, 1.0, -1, "thumbs_up", "Thumbs Down", "👍", "👎", "true", "False"])
@pytest.mark.parametrize("format", ["completion-label", "messages-label"])
def test_a_label_says_whether_an_answer_is_wanted(format, label):
    row = {"prompt": ASK, "completion": GOOD} if format == "completion-label" else {"messages": talk(ASK, GOOD)}
    (example,), reading = examples_of({**row, "label": label}, task="kto")
    assert reading.format == format
    assert example["label"] is (str(label).lower() in ("true", "1", "1.0", "thumbs_up", "👍"))
    made, _, tokenizer = tokens_of([example])
    assert made[0]["label"] is example["label"]
    assert tokenizer.decode([token for token in made[0]["labels"] if token != IGNORED]) == f"{GOOD}</s>"


def test_what_says_nothing_is_left_out_and_counted():
    rows = [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD, "rejected": GOOD},
        {"prompt": None, "chosen": talk(ASK, GOOD), "rejected": talk(ASK, GOOD)},
        {"prompt": ASK, "chosen": GOOD, "rejected": " "},
        {"prompt": None, "chosen": talk(ASK, GOOD), "rejected": talk("and the dog ?", BAD)},
    ]
    examples, reading = examples_of(*rows)
    assert examples == [{"prompt": ASK, "completion": GOOD, "rejected": BAD}]
    assert reading.counts.dropped == {
        "chosen and rejected are the same": 2,
        "an answer is blank": 1,
        "chosen and rejected answer different prompts": 1,
    }
    assert reading.counts.notices("d")[0] == "d: 2 of 5 rows left out: chosen and rejected are the same"
    with pytest.raises(FormatError, match="d: all 1 rows are left out: chosen and rejected are the same"):
        examples_of(rows[1])
    with pytest.raises(FormatError, match="all 1 rows are left out: winner prefers neither answer"):
        examples_of({"conversation_a": talk(ASK, GOOD), "conversation_b": talk(ASK, BAD), "winner": "tie (bothbad)"})


REFUSED = {
    "tools beside texts": ({"tools": [{"name": "look"}]}, "'tools' needs a prompt or answers that are lists of turns"),
    "an image": ({"images": ["cat.png"]}, "'images': only text is read"),
    "a context that nothing reads": ({"history": "a cat sat ."}, "format preference does not read 'history'"),
    "another prompt": ({"chosen": talk("the dog ?", GOOD)}, "'chosen' is a conversation without the prompt"),
    "an input beside turns": ({"input": "a cat", "chosen": [TURN]}, "'input' needs a prompt and answers that"),
    "no prompt": ({"prompt": ""}, "there is no prompt, and chosen and rejected do not begin with one"),
    "a number": ({"chosen": 3}, "of type int"),
    "the last word of the user": ({"chosen": talk(ASK, GOOD, "thanks")}, "must end with the assistant's answer"),
    "an image in a turn": ({"chosen": [{**TURN, "content": [{"type": "image"}]}]}, "a part of type 'image'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_by_name(case):
    changes, message = REFUSED[case]
    with pytest.raises(FormatError, match=f"d:1: .*{message}"):
        examples_of({"prompt": ASK, "chosen": GOOD, "rejected": BAD, **changes})


def test_what_is_no_label_is_refused():
    with pytest.raises(FormatError, match=r"'label' is of type int .5.; true or false, 1 or 0"):
        examples_of({"prompt": ASK, "completion": GOOD, "label": 5}, task="kto")
    with pytest.raises(FormatError, match="d:1: there is no prompt; name its column"):
        examples_of({"completion": GOOD, "label": 1}, task="kto")


def test_other_tasks_say_where_preferences_belong():
    row = PAIRS["texts"][0]
    with pytest.raises(FormatError, match="are preferences: set task: dpo or reward"):
        choose_format(row, "sft", "d")
    with pytest.raises(FormatError, match="are pairs: set task: dpo or reward; or write each as two rows"):
        choose_format(row, "kto", "d")
    with pytest.raises(FormatError, match=r"fit no format of task kto; .*label: thumbs"):
        choose_format({"a": 1}, "kto", "d")
    with pytest.raises(ConfigError, match=r"data\.format text does not go with task dpo"):
        choose_format(row, "dpo", "d", asked="text")


def test_answers_that_differ_only_in_what_is_cut_off_are_counted():
    from datasets import Dataset

    (example,), _ = examples_of({"prompt": ASK, "chosen": f"{GOOD} yes", "rejected": f"{GOOD} no"})
    made, counts = prepare(Dataset.from_list([example]), byte_tokenizer(), Limits(length=len(ASK + GOOD)))
    assert (len(made), counts.cut, counts.empty, counts.lost_ends) == (0, 1, 1, 2)


def test_every_format_of_preferences_has_a_row():
    wanted = {name for name, entry in FORMATS.items() if {"dpo", "kto", "grpo"} & set(entry.tasks)}
    tried = {format for _, format in PAIRS.values()} | {"completion-label", "messages-label", "prompt-answer"}
    assert wanted == tried


@pytest.mark.parametrize(
    "row",
    [
        {"question": ASK, "answer": GOOD},
        {"problem": ASK, "solution": GOOD},
        {"prompt": talk(ASK), "answer": GOOD},
        {"messages": talk(ASK, GOOD)},
    ],
)
def test_a_prompt_may_have_an_answer(row):
    (example,), reading = examples_of(row, task="grpo")
    assert (reading.format, example["answer"]) == ("prompt-answer", GOOD)
    assert example.get("prompt", ASK) == ASK
    assert ("conversation" in example) == any(isinstance(value, list) for value in row.values())


def test_of_prompts_what_a_reward_cannot_see_is_refused():
    with pytest.raises(FormatError, match="format prompt-answer does not read 'tools'"):
        examples_of({"prompt": talk(ASK), "tools": [{"name": "look"}]}, task="grpo")
    with pytest.raises(FormatError, match="a turn has name, which task grpo does not read"):
        examples_of({"prompt": [{"role": "user", "content": ASK, "name": "Zoe"}]}, task="grpo")
