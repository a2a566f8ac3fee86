"""What of an example is learned: one row a conversation where nothing changes by that, n rows elsewhere; its end."""

import json

import pytest
import torch
from datasets import Dataset

from flashbone.errors import FormatError
from flashbone.train.data.prepared import Limits, check, prepare
from flashbone.train.data.tokens import Tokens, bracketed, end_marks, end_token, tokenise
from helpers.comparison import close
from helpers.tiny_llama import CHAT, tiny_tokenizer, word_tokenizer

TALK = [("user", "where was it ?"), ("assistant", "on the mat"), ("user", "was it big ?"), ("assistant", "no . small")]

# Of an answer that is not the last it leaves the word "yes" out, as models leave out their earlier reasoning.
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|> {{ 'yes ' if loop.last and m.role == 'assistant' }}{{ m.content }} </s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKS = (
    "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %} <unk>{% endfor %}"
)


def conversation(turns=TALK, learned=None, **more):
    messages = [{"role": role, "content": content} for role, content in turns]
    learned = [role == "assistant" for role, _ in turns] if learned is None else learned
    return {"conversation": json.dumps({"messages": messages, "learned": learned, **more})}


def shown(example, tokenizer):
    return [bracketed(row, tokenizer) for row in tokenise(example, tokenizer)]


def test_a_conversation_is_one_row_and_its_answers_are_learned_with_their_ends():
    assert shown(conversation(), tiny_tokenizer()) == [
        "<|user|> where was it ? </s> <|assistant|>[[on the mat </s>]]"
        "<|user|> was it big ? </s> <|assistant|>[[no . small </s>]]"
    ]


def test_an_answer_that_is_not_learned_is_context():
    rows = shown(conversation(learned=[False, False, False, True]), tiny_tokenizer())
    assert len(rows) == 1
    assert rows[0].count("[[") == 1
    assert rows[0].endswith("[[no . small </s>]]")
    first = shown(conversation(learned=[False, True, False, False]), tiny_tokenizer())
    assert first == ["<|user|> where was it ? </s> <|assistant|>[[on the mat </s>]]"]


def test_answers_that_the_template_writes_otherwise_later_are_rows_of_their_own():
    rows = shown(conversation(), tiny_tokenizer(FORGETS))
    assert len(rows) == 2
    assert rows[0].endswith("[[yes on the mat </s>]]")
    assert "<|assistant|> on the mat </s>" in rows[1]
    assert rows[1].endswith("[[yes no . small </s>]]")


# As Phi-3's: the tokenizer's end token comes once, after the whole text.
ENDS_ONCE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} END{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% else %}</s>{% endif %}"
)


def test_where_a_template_ends_the_whole_text_each_answer_learns_an_end_of_its_own():
    with_marks = shown(conversation(), tiny_tokenizer(ENDS_ONCE.replace("END", "<unk> ")))
    assert [text.count("[[") for text in with_marks] == [2]
    assert "[[on the mat <unk>]]" in with_marks[0]
    assert with_marks[0].endswith("[[no . small <unk> </s>]]")
    without = shown(conversation(), tiny_tokenizer(ENDS_ONCE.replace("END", "")))
    assert [text.partition("[[")[2] for text in without] == ["on the mat </s>]]", "no . small </s>]]"]


def test_names_of_speakers_are_counted_where_the_template_leaves_them_out(caplog):
    caplog.set_level("INFO")
    named = json.loads(conversation()["conversation"])
    named["messages"][0]["name"] = "Zoe"
    rows = Dataset.from_list([{"conversation": json.dumps(named)}, conversation()])
    _, counts = prepare(rows, tiny_tokenizer(), Limits())
    assert counts.unnamed == 1
    check(counts, "d", "training", None, False, list)
    assert "data: d: the chat template leaves out 'name' in 1 training rows" in caplog.messages
    writes = CHAT.replace("{{ m['content'] }}", "{{ m.name or '' }} {{ m['content'] }}")
    assert prepare(rows, tiny_tokenizer(writes), Limits())[1].unnamed == 0


def test_generation_marks_of_the_template_decide_what_of_an_answer_is_learned():
    rows = shown(conversation(), tiny_tokenizer(MARKS))
    assert rows == [
        "<|user|> where was it ? <unk> <|assistant|>[[on the mat </s>]]<unk> <|user|> was it big ? <unk> <|assistant|>"
        "[[no . small </s>]]<unk>"
    ]


def test_one_row_has_the_loss_of_one_row_for_each_answer_and_fewer_tokens():
    from transformers import LlamaForCausalLM

    from helpers.tiny_llama import tiny_config

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(len(tokenizer))).double().eval()

    def loss(rows: list[Tokens]):
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            logits = model(torch.tensor([row.ids])).logits[0, :-1]
            labels = torch.tensor(row.labels[1:])
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        return total

    turns = TALK * 4
    one = tokenise(conversation(turns), tokenizer)
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    alone = [tokenise(conversation(turns, [i == n for i in range(len(turns))]), tokenizer)[0] for n in answers]
    assert (len(one), len(alone)) == (1, 8)
    assert sum(map(sum, (row.learned for row in one))) == sum(map(sum, (row.learned for row in alone)))
    assert close(loss(one), loss(alone), torch.float64)
    assert sum(len(row.ids) for row in alone) > 4 * len(one[0].ids)


def test_windows_of_documents_are_taken_as_they_are_and_need_no_end():
    assert tokenise({"input_ids": [7, 8, 9]}, tiny_tokenizer()) == [Tokens([7, 8, 9], [True] * 3, [])]


@pytest.mark.parametrize("text", ["the cat", "the cat </s>"])
def test_a_tokenizer_that_ends_texts_by_itself_does_it_once(text):
    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat"]
    encloses = word_tokenizer(words, "<pad>", "<s>", "</s>", "<unk>")
    (row,) = tokenise({"text": text}, encloses)
    assert row.ids[0] == 1
    assert row.ids.count(2) == 1
    assert row.ids[-1] == 2
    (row,) = tokenise({"prompt": "the", "completion": " cat sat"}, encloses)
    assert (row.ids, row.learned) == ([1, 4, 5, 6, 2], [False, False, True, True, True])


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT, "</s>"),
        (CHAT.replace("</s>", "<|user|>"), "<|user|>"),
        (CHAT.replace(" </s>", " "), None),
        (CHAT.replace("</s>", "."), None),
    ],
)
def test_an_answer_ends_in_a_token_of_the_tokenizers_own_or_in_nothing(template, end):
    tokenizer = tiny_tokenizer(template)
    for row in tokenise(conversation(), tokenizer):
        tokens = [end_token(row, place, tokenizer, end_marks(tokenizer)) for place in row.ends]
        assert [None if token is None else tokenizer.decode(token) for token in tokens] == [end] * len(row.ends)


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            TALK,
            "refuses the conversation: System role not supported",
        ),
        ("{{ messages[0]['name'].upper() }}", TALK, "UndefinedError: .*has no attribute 'name'"),
        ("{% for m in messages %", TALK, "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", TALK, "SecurityError"),
        (
            CHAT.replace("in messages", "in messages if m.role != 'system'"),
            [("system", "yes"), *TALK],
            "leaves out the sys",
        ),
    ],
)
def test_what_the_template_refuses_or_leaves_out_is_said_in_one_line(template, turns, words):
    with pytest.raises(FormatError, match=words) as error:
        tokenise(conversation(turns), tiny_tokenizer(template))
    assert "\n" not in str(error.value)


def test_tools_that_the_template_does_not_write_are_refused():
    tools = [
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
    ]
    with pytest.raises(FormatError, match=r"leaves out the tools \('weather'\)"):
        tokenise(conversation(tools=tools), tiny_tokenizer())
    written = tiny_tokenizer("{% for t in tools %}{{ t['function']['name'] }} {% endfor %}" + CHAT)
    assert len(tokenise(conversation(tools=tools), written)) == 1
