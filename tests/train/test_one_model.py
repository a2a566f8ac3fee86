"""One trained adapter answers alike by base and adapter, by train's merge and by the command's, whatever it brings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from training_runs import recipe_for
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flashbone import BoneConfig
from flashbone.cli import main
from flashbone.evaluate.exact_match import exact_matches, make_prompt
from flashbone.evaluate.loading import load_language_model
from flashbone.files.beside import beside, tokenizer_folder
from flashbone.merge.verify import compare_logits
from flashbone.train.run import train
from helpers.rwkv import write_rwkv
from helpers.tiny_llama import CHAT, questions, write_tiny_llama

QUESTIONS = ["where was the cat ?", "what did the dog do ?", "is the mat red ?"]
OTHER_TEMPLATE = CHAT.replace("</s>", "<|system|>").replace("<|assistant|> ", "<|assistant|> the ")


def answers(model: Path, adapter: Path | None = None, merge: bool = False, vocabulary=None) -> list[tuple[str, int]]:
    loaded, tokenizer = load_language_model(
        str(model), adapter, torch.float32, "cpu", merge=merge, vocabulary=vocabulary
    )
    chat = tokenizer.chat_template is not None
    rows = [(make_prompt(question, chat=chat), "x") for question in QUESTIONS]
    return [(row.text, row.tokens) for row in exact_matches(loaded, tokenizer, rows, max_new_tokens=12)]


def merged_by_command(base: Path, adapter: Path, out: Path) -> Path:
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    return out


@pytest.fixture
def base(tmp_path):
    return write_tiny_llama(tmp_path / "base")


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"the {name} sat", "completion": " on a mat"} for name in ("cat", "dog")] * (count // 2)


@pytest.mark.parametrize("case", ["the base's template", "a template of its own", "no template at all"])
def test_an_adapter_answers_alike_by_every_way_that_it_is_merged(case, base, jsonl, tmp_path, capsys):
    rows, training = questions(24), {"max_steps": 4, "learning_rate": 2e-2, "save_strategy": "no"}
    if case == "a template of its own":
        (tmp_path / "other.jinja").write_text(OTHER_TEMPLATE)
        training["chat_template_path"] = str(tmp_path / "other.jinja")
    if case == "no template at all":
        write_tiny_llama(base, chat_template=None)
        (base / "chat_template.jinja").unlink(missing_ok=True)
        rows = pairs(24)
    train(recipe_for(base, jsonl(rows), tmp_path / "run", training=training, merge=True))
    adapter = tmp_path / "run/adapter"
    capsys.readouterr()
    out = merged_by_command(base, adapter, tmp_path / "out")
    assert f"tokenizer of {adapter}" in capsys.readouterr().out
    wanted = answers(base, adapter)
    assert any(text for text, _ in wanted)
    assert answers(base, adapter, merge=True) == wanted
    assert answers(tmp_path / "run/merged") == wanted
    assert answers(out) == wanted
    names = [{path.name for path in folder.iterdir()} for folder in (out, tmp_path / "run/merged")]
    assert names[0] == names[1]
    for name in names[0] - {"merge.json"}:
        assert (out / name).read_bytes() == (tmp_path / "run/merged" / name).read_bytes(), name


def test_a_head_that_the_checkpoint_lacks_is_merged_from_the_loaded_model(base, jsonl, tmp_path):
    """No file holds it, so the command's merge cannot write it."""
    AutoModel.from_pretrained(base).save_pretrained(base)
    training = {"max_steps": 2, "learning_rate": 2e-2, "save_strategy": "no"}
    train(recipe_for(base, jsonl(questions(24)), tmp_path / "run", training=training, merge=True))
    assert answers(tmp_path / "run/merged") == answers(base, tmp_path / "run/adapter")


def trained_in_python(base: Path, folder: Path) -> Path:
    """An adapter that somebody trained with PEFT: random blocks."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), BoneConfig(r=8, target_modules=["q_proj"]))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "bone_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def test_generation_stops_where_the_adapters_settings_say(base, tmp_path):
    """Every token of the first answer but its first ends it: without them the answer would be longer."""
    adapter = trained_in_python(base, tmp_path / "adapter")
    plain = answers(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = sorted({id_ for text, _ in plain for id_ in tokenizer(text, add_special_tokens=False)["input_ids"][1:]})
    GenerationConfig(eos_token_id=[2, *ends]).save_pretrained(adapter)
    wanted = answers(base, adapter)
    assert wanted != plain
    assert answers(base, adapter, merge=True) == wanted
    assert answers(merged_by_command(base, adapter, tmp_path / "out")) == wanted


def test_another_end_token_and_a_template_without_a_tokenizer_come_along(base, tmp_path):
    adapter = trained_in_python(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    of_template = answers(base, adapter)
    assert of_template != answers(
        base, shutil.copytree(adapter, tmp_path / "plain", ignore=lambda *_: ["chat_template.jinja"])
    )
    assert answers(merged_by_command(base, adapter, tmp_path / "out")) == of_template
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|system|>"
    tokenizer.save_pretrained(adapter)
    assert answers(merged_by_command(base, adapter, tmp_path / "out2")) == answers(base, adapter)
    config = json.loads((tmp_path / "out2/tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|system|>"


@pytest.mark.parametrize("saved", ["listed", "by itself"])
def test_tokens_that_an_adapter_added_come_along(saved, base, tmp_path):
    """With the embeddings that it grew for them; PEFT saves grown ones by itself, too."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.add_tokens(["zebra", "maybe"])
    tokenizer.chat_template = OTHER_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole = ["embed_tokens", "lm_head"] if saved == "listed" else None
    adapted = get_peft_model(model, BoneConfig(r=8, target_modules=["q_proj"], modules_to_save=whole))
    for name, parameter in adapted.named_parameters():
        if "bone_" in name or "embed_tokens" in name:
            parameter.data.normal_(std=0.3)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter, save_embedding_layers=whole is None)
    tokenizer.save_pretrained(adapter)
    wanted = answers(base, adapter)
    assert answers(base, adapter, merge=True) == wanted
    out = merged_by_command(base, adapter, tmp_path / "out")
    assert answers(out) == wanted
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(tokenizer)
    assert compare_logits(base, [adapter], None, out).ok


def test_verification_compares_the_first_tokens_of_an_answer(base, tmp_path):
    """Of a merged folder whose template was changed the outputs are right, and the answer is another."""
    adapter = trained_in_python(base, tmp_path / "adapter")
    out = merged_by_command(base, adapter, tmp_path / "out")
    right = compare_logits(base, [adapter], None, out)
    assert (right.ok, right.same_answer) == (True, True)
    assert 1 <= right.answer_tokens <= 8
    (out / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    wrong = compare_logits(base, [adapter], None, out)
    assert wrong.unexplained <= wrong.limit
    assert (wrong.ok, wrong.same_answer) == (False, False)


@pytest.mark.parametrize("what", ["eos", "sampling", "the tokenizer's end", "no settings"])
def test_verification_compares_what_ends_an_answer(what, base, tmp_path):
    """Also where none of the first tokens shows it."""
    adapter = trained_in_python(base, tmp_path / "adapter")
    GenerationConfig(eos_token_id=[2, 33]).save_pretrained(adapter)
    out = merged_by_command(base, adapter, tmp_path / "out")
    assert compare_logits(base, [adapter], None, out).ok
    file = out / ("tokenizer_config.json" if "tokenizer" in what else "generation_config.json")
    change = {
        "eos": {"eos_token_id": [2]},
        "sampling": {"do_sample": True},
        "the tokenizer's end": {"eos_token": "<s>"},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | change.get(what, {})))
    if what == "no settings":
        file.unlink()
    wrong = compare_logits(base, [adapter], None, out)
    assert (wrong.ok, wrong.same_answer) == (False, False)


def test_a_checkpoint_is_an_adapter_that_stops_where_the_runs_does(base, jsonl, tmp_path):
    for name in ("config.json", "generation_config.json"):  # generation would stop elsewhere
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | {"eos_token_id": 1}))
    training = {"max_steps": 2, "save_steps": 2, "learning_rate": 2e-2}
    train(recipe_for(base, jsonl(questions(24)), tmp_path / "run", training=training))
    brought = [beside([tmp_path / "run" / name]).files for name in ("adapter", "checkpoint-2")]
    assert {name: file.read_bytes() for name, file in brought[0].items()} == {
        name: file.read_bytes() for name, file in brought[1].items()
    }
    assert set(json.loads(brought[1]["generation_config.json"].read_text())["eos_token_id"]) == {1, 2}


def test_several_adapters_bring_what_they_agree_on(base, tmp_path):
    first, second = trained_in_python(base, tmp_path / "a"), trained_in_python(base, tmp_path / "b")
    for folder in (first, second):
        (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    assert beside([first, second]).files == {"chat_template.jinja": first / "chat_template.jinja"}
    (second / "chat_template.jinja").write_text(CHAT)
    brought = beside([first, second])
    assert (brought.files, brought.words) == ({}, "chat template of the base, since the adapters' differ")


def test_a_merged_pth_keeps_the_adapters_template_beside_it(tmp_path):
    pytest.importorskip("rwkv", reason="rwkv is not installed; `make test` does it")
    from flashbone.rwkv import RwkvTokenizer, from_pth

    vocabulary = tmp_path / "bytes.txt"
    vocabulary.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    base = write_rwkv(tmp_path / "base.pth", 7, vocabulary=260)
    adapter = tmp_path / "adapter"
    model = get_peft_model(from_pth(base), BoneConfig(r=4, target_modules=["key"], init_weights=False))
    model.save_pretrained(adapter, save_embedding_layers=False)
    tokenizer = RwkvTokenizer(vocabulary)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}{% endfor %}A:"
    tokenizer.save_pretrained(adapter)
    out = merged_by_command(base, adapter, tmp_path / "out.pth")
    assert (tokenizer_folder(out) / "tokenizer_config.json").is_file()
    assert answers(out) == answers(base, adapter)
