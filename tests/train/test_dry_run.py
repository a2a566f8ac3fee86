"""A dry run says what a run does: its rows, its very labels, its steps and its trained parameters; it needs no weights
and writes nothing."""

import json
import shutil
import sys

import pytest

from flashbone.cli import main
from flashbone.errors import ConfigError
from flashbone.train.arguments import trainer_arguments
from flashbone.train.data.loading import load_data
from flashbone.train.data.tokens import IGNORED
from flashbone.train.lengths import limit_length
from flashbone.train.plan import plan
from flashbone.train.recipe import DataRecipe
from flashbone.train.run import train
from flashbone.train.tokenizers import load_tokenizer
from flashbone.train.trainers import build_trainer
from helpers.tiny_llama import WORDS, questions, word_tokenizer, write_tiny_llama
from train.training_runs import config_file, recipe_for

CHATS = [
    {
        "messages": [
            {"role": "user", "content": "where is the cat ?"},
            {"role": "assistant", "content": "on the mat ."},
            {"role": "user", "content": "what did it do ?"},
            {"role": "assistant", "content": "it sat ."},
        ],
        "id": number,
    }
    for number in range(9)
]
LABELLED = [{"text": row["prompt"], "label": "mat" if "mat" in row["completion"] else "tree"} for row in questions(21)]


@pytest.fixture
def weightless(tmp_path):
    """A model's folder without its weights."""
    folder = write_tiny_llama(tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    return folder


def dry_run(recipe, tmp_path, capsys, *flags):
    code = main(["train", str(config_file(recipe, tmp_path / "c.yaml")), "--dry-run", "--json", *flags])
    out, err = capsys.readouterr()
    print(err, file=sys.stderr)
    return code, json.loads(out) if code == 0 else err


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_json_has_five_parts_and_nothing_is_written_or_loaded(weightless, tmp_path, capsys):
    file = write(tmp_path / "chats.jsonl", CHATS)
    recipe = recipe_for(weightless, file, tmp_path / "out", data=DataRecipe(file, eval=2))
    before = sorted(tmp_path.rglob("*"))
    code, made = dry_run(recipe, tmp_path, capsys)
    assert code == 0
    assert list(made) == ["rows", "columns", "examples", "steps", "parameters"]
    counts = {"format": "messages", "read": 9, "kept": 9, "dropped": {}, "cut": 0, "held_out": 2, "learned": 7}
    assert {name: made["rows"][file][name] for name in counts} == counts
    assert made["columns"] == {"used": ["messages"], "unused": ["id"]}
    assert [example["learned"] for example in made["examples"]] == [["on the mat . </s>", "it sat . </s>"]] * 3
    assert made["examples"][0]["text"].startswith("<|user|> where is the cat ?")
    assert made["parameters"]["memory"]["training_bytes"] > made["parameters"]["memory"]["base_bytes"] > 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "c.yaml"])


def test_what_is_shown_as_learned_is_what_the_trainer_learns(llama, tmp_path):
    sources = [write(tmp_path / "a.jsonl", CHATS), write(tmp_path / "b.jsonl", questions(5))]
    sources.append(write(tmp_path / "c.jsonl", [{"text": "the cat sat"}] * 4))
    recipe = recipe_for(llama, "", tmp_path / "out", data=DataRecipe(sources=sources, eval=None))
    shown = plan(recipe).examples
    args = trainer_arguments(recipe)
    limit_length(recipe, args)
    trainer, _ = build_trainer(recipe, args, load_data(recipe))
    decode = trainer.processing_class.decode
    for example, number in zip(shown, (0, 9, 14), strict=True):
        row = trainer.train_dataset[number]
        labels = trainer.data_collator([row])["labels"][0].tolist()
        learned = decode([token for token in labels if token != IGNORED])
        assert example.text == decode(row["input_ids"])
        assert " ".join(example.learned) == learned


@pytest.mark.parametrize(
    ("task", "training"),
    [
        ("sft", {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}),
        ("sft", {"max_steps": -1, "num_train_epochs": 1.5, "packing": True, "max_length": 32}),
        ("classification", {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}),
    ],
)
def test_steps_and_trained_parameters_are_those_of_the_run(llama, tmp_path, capsys, task, training):
    rows = LABELLED if task == "classification" else questions(21)
    file = write(tmp_path / "rows.jsonl", rows)
    recipe = recipe_for(llama, file, tmp_path / "out", task=task, training=training)
    code, made = dry_run(recipe, tmp_path, capsys)
    assert code == 0
    summary = train(recipe).summary
    assert made["steps"] == summary["steps"]
    for name in ("trainable_parameters", "total_parameters"):
        assert made["parameters"][name] == summary[name]
    assert made["rows"][file]["learned"] == summary["sources"][0]["learned"]


def gguf_recipe(tmp_path):
    from hostile.originals import write_gguf

    write_gguf(tmp_path / "gguf" / "model.gguf")
    file = write(tmp_path / "rows.jsonl", LABELLED)
    return recipe_for(tmp_path / "gguf" / "model.gguf", file, tmp_path / "out", task="classification")


def rwkv_recipe(tmp_path):
    from helpers.rwkv import write_rwkv

    (tmp_path / "bytes.txt").write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    model = write_rwkv(tmp_path / "model.pth", 7, hidden=32, head=8, layers=1, vocabulary=260)
    file, rwkv = write(tmp_path / "rows.jsonl", questions(9)), {"vocabulary": str(tmp_path / "bytes.txt")}
    return recipe_for(model, file, tmp_path / "out", rwkv=rwkv | {"train_parts": ["ln"]})


@pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning")  # peft looks for one
@pytest.mark.parametrize("make", [gguf_recipe, rwkv_recipe])
def test_models_in_single_files_are_counted_as_the_run_has_them(make, tmp_path, capsys, caplog):
    recipe = make(tmp_path)
    if make is gguf_recipe:
        try:
            load_tokenizer(recipe.model)
        except ConfigError as error:
            if "argument 'merges'" not in str(error):
                raise
            pytest.skip("this transformers cannot read a tokenizer without merges from a GGUF")
    recipe.samples, recipe.training["max_steps"] = 0, 1
    code, made = dry_run(recipe, tmp_path, capsys)
    assert code == 0
    assert ("not compared with its weights" in caplog.text) == (recipe.task == "classification")
    memory = made["parameters"].pop("memory")
    summary = train(recipe).summary
    assert {name: summary[name] for name in made["parameters"]} == made["parameters"]
    assert memory["weight_bytes"] == 4 * made["parameters"]["trainable_parameters"]


def test_nothing_says_that_weights_are_loaded(llama, tmp_path, capsys, caplog):
    file = write(tmp_path / "rows.jsonl", LABELLED)
    recipe = recipe_for(llama, file, tmp_path / "out", task="classification")
    assert main(["train", str(config_file(recipe, tmp_path / "c.yaml")), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "Loading weights" not in said
    assert "LOAD REPORT" not in said
    assert "LOAD REPORT" not in caplog.text
    assert "its checkpoint has no score; trained whole" in caplog.text


def test_modules_that_a_checkpoint_lacks_are_counted_as_trained(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer = word_tokenizer([*special, *WORDS.split()], *special)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")  # has no pooler
    tokenizer.save_pretrained(tmp_path / "bert")
    file = write(tmp_path / "rows.jsonl", LABELLED)
    recipe = recipe_for(tmp_path / "bert", file, tmp_path / "out", task="classification", training={"max_steps": 1})
    made, summary = plan(recipe).parameters, train(recipe).summary
    assert {name: summary[name] for name in made} == made


def test_cut_and_dropped_rows_are_counted_with_why(weightless, tmp_path, capsys):
    rows = [*questions(8), {"prompt": "the cat " * 8, "completion": "yes"}]
    file = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "where ?", "completion": " on the mat" * 5}])
    recipe = recipe_for(
        weightless, file, tmp_path / "out", data=DataRecipe(file, eval=None), training={"max_length": 14}
    )
    code, made = dry_run(recipe, tmp_path, capsys)
    assert code == 0
    (counts,) = made["rows"].values()
    assert counts["dropped"] == {"nothing left to learn within training.max_length": 1}
    assert (counts["read"], counts["kept"], counts["cut"]) == (10, 9, 2)


def test_unlabelled_rows_and_classes_are_shown(weightless, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [*LABELLED, {"text": "the dog", "label": None}])
    data = DataRecipe(file, drop_unlabelled=True, eval=None)
    recipe = recipe_for(weightless, file, tmp_path / "out", task="classification", data=data)
    code, made = dry_run(recipe, tmp_path, capsys)
    assert code == 0
    assert (made["rows"][file]["read"], made["rows"][file]["dropped"]) == (22, {"no class": 1})
    assert made["examples"][0] == {"text": LABELLED[0]["text"], "learned": [LABELLED[0]["label"]]}


def test_errors_are_those_of_training_in_one_line(weightless, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"nothing": 1}])
    code, error = dry_run(recipe_for(weightless, file, tmp_path / "out"), tmp_path, capsys)
    assert code == 1
    assert error.splitlines()[-1].startswith("flashbone train: error: ")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(weightless)
    code, error = dry_run(recipe_for(weightless, write(tmp_path / "q.jsonl", questions(9)), "out"), tmp_path, capsys)
    assert code == 1
    assert "weightless" in error.splitlines()[-1]


def test_on_a_terminal_with_colours_what_is_learned_is_green(weightless, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = write(tmp_path / "rows.jsonl", questions(20))
    path = config_file(recipe_for(weightless, file, tmp_path / "out"), tmp_path / "c.yaml")
    assert main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "where was the big dog ?\x1b[1;32mon the tree . yes it sat </s>\x1b[0m" in out
    assert "[[" not in out


def test_a_held_out_file_and_a_path_that_is_in_two_sources_have_rows_of_their_own(weightless, tmp_path, capsys):
    file, held = write(tmp_path / "a.jsonl", questions(20)), write(tmp_path / "h.jsonl", questions(4))
    data = DataRecipe(sources=[{"path": file, "split": "train[:10]"}, {"path": file, "split": "train[10:]"}], eval=held)
    code, made = dry_run(recipe_for(weightless, "", tmp_path / "out", data=data), tmp_path, capsys)
    assert code == 0
    assert list(made["rows"]) == [f"{file} (1)", f"{file} (2)", held]
    assert [source["read"] for source in made["rows"].values()] == [10, 10, 4]
    assert [(source["held_out"], source["learned"]) for source in made["rows"].values()] == [(0, 10), (0, 10), (4, 0)]


def test_people_get_a_table_lengths_and_brackets_where_there_is_no_colour(weightless, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", questions(20))
    path = config_file(recipe_for(weightless, file, tmp_path / "out"), tmp_path / "c.yaml")
    assert main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "where was the big dog ?[[on the tree . yes it sat </s>]]" in out
    assert f"{file} (prompt-completion)\n  20 rows read, 20 kept, 0 cut; 2 held out, 18 learned in an epoch\n" in out
    for words in ("steps: 10", "tokens of a row, as cut", "14  ██", "columns used: prompt, completion"):
        assert words in out


def test_of_a_long_prompt_the_begin_and_the_end_are_shown_and_what_is_learned(weightless, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "red " + "cat " * 150 + "blue", "completion": " yes"}] * 4)
    path = config_file(recipe_for(weightless, file, tmp_path / "out"), tmp_path / "c.yaml")
    assert main(["train", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out.partition("example 1")[2].partition("example 2")[0]
    assert len(shown) < 600
    assert "\nred cat" in shown
    assert " … " in shown
    assert "cat blue[[yes </s>]]" in shown
