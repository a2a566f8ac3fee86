"""Which answer is found in a text, and when two answers are the same."""

import json
import re
from pathlib import Path

import pytest

from flashbone.train.data.answers import given_answer, is_same, wanted_answer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("#### $1,234.50", "1234.5"),
        ("#### -5\n\nQuestion: next\n#### 7", "-5"),  # a model that runs on
        ("First the answer is 3, but then\nThe answer is: 18.0", "18"),
        ("The answer is 18 dollars and 50 cents.", "18"),
        ("so he has 16 - 3 = 13 left. It costs 13.", "13"),
        ("10-3", "3"),
        ("x = -7.", "-7"),
        ("a loss of -$5", "-5"),
        ("2,3,4", "4"),
        ("3/4", "0.75"),
        ("\\boxed{42}", "42"),
        ("half is .5", "1/2"),
        ("it rose by 150%", "150"),
    ],
)
def test_the_number_of_an_answer_is_found(text, wanted):
    assert is_same(given_answer(text, wanted), wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("#### 18 of 20", "20"),
        ("The answer is: 3\nand 18", "18"),
        ("18, no: 19", "18"),
        ("#### none, though 18 was near", "19"),
        ("eighteen", "18"),
        ("1,800", "800"),
        ("-18", "18"),
        ("18.01", "18"),
        ("", "18"),
        ("####\n18", "19"),
    ],
)
def test_another_number_is_wrong(text, wanted):
    assert not is_same(given_answer(text, wanted), wanted)


@pytest.mark.parametrize(("text", "right"), [("yes.", True), ("The answer is: yes", True), ("yes and no", False)])
def test_where_no_number_is_wanted_the_whole_answer_counts(text, right):
    assert is_same(given_answer(text, "yes"), "yes") is right


def test_references_end_in_hashes_or_in_metamaths_words_or_are_the_answer():
    assert wanted_answer("9*2=18\n#### 18") == "18"
    assert wanted_answer("So x is 4.\nThe answer is: 4") == "4"
    assert wanted_answer(" Paris ") == "Paris"


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K lies beside this project's own checkout only")
def test_every_reference_of_gsm8k_answers_itself_and_not_its_neighbour():
    references = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert len(references) == 1319
    wanted = [wanted_answer(text) for text in references]
    plain = [float(re.search(r"#### (-?[\d,.]+)$", text)[1].replace(",", "")) for text in references]
    for i, text in enumerate(references):
        unmarked = text.replace("####", "")  # then it is the last number
        assert is_same(given_answer(text, wanted[i]), wanted[i])
        assert is_same(given_answer(unmarked, wanted[i]), wanted[i])
        assert is_same(given_answer(text, wanted[i]), wanted[i - 1]) == (plain[i] == plain[i - 1])
