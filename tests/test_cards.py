"""The cards beside adapters: of converted ones, and of those that a live model saves."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from flashbone import BoneConfig, cards, variants
from flashbone.checkpoint import Adapter
from flashbone.conversion import formats
from helpers.adapter_folders import tiny_bert, tiny_llama
from helpers.blocks import VARIANT_NAMES


def card(**fields) -> cards.Card:
    given = {
        "format": "peft",
        "variant": "bone",
        "r": (4, 64),
        "targets": ("layers.0.q", "layers.1.q", "v"),
        "base": "a/b",
    }
    return cards.Card(**(given | fields))


def commands(text: str) -> list[str]:
    return re.findall(r"^flashbone \w+ .*$", text, re.MULTILINE)


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_card_says_what_the_adapter_is_and_which_ways_lead_out(variant):
    page = cards.page(card(variant=variant))
    assert f"| variant | `{variant}` (Bone family) |" in page
    assert "| r | 4, 64 |" in page
    assert "| targets | `q`, `v` |" in page
    assert "| base model | `a/b` |" in page
    assert ("PEFT 0.14 to 0.18 loads it as it is" in page) == (variant in ("bone", "bat-col"))
    found = commands(page)
    assert ("flashbone convert ADAPTER OUT --to miss" in found) == (variant in ("bone", "mini", "bat-col"))
    assert ("flashbone convert ADAPTER OUT --to rwkv-peft" in found) == (variant in ("bone", "bat-row"))
    exact = variant in ("bone", "mini")
    lora = "flashbone convert ADAPTER OUT --to lora --base BASE" + ("" if exact else " --error 0.01")
    assert lora in found
    assert found[-1] == "flashbone merge BASE ADAPTER OUT"


@pytest.mark.parametrize(
    ("form", "word"), [("miss", "PEFT 0.17"), ("lora", "every engine"), ("rwkv-peft", "RWKV-PEFT")]
)
def test_cards_of_other_formats_say_how_those_are_loaded(form, word):
    page = cards.page(card(format=form, variant=None if form == "lora" else "bone"))
    assert word in page
    assert "import flashbone" not in page
    assert ("plain LoRA" in page) == (form == "lora")


@pytest.mark.parametrize("base", [None, "org/model", "/a path/: colons", 'a"b\n---\nx: [y]', "- x", "yes", "a|b`c"])
def test_the_hub_reads_the_head_of_every_card(tmp_path, base):
    (tmp_path / "README.md").write_text(cards.page(card(base=base)))
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == base
    assert (read.data.library_name, read.data.tags) == ("peft", ["bone", "flashbone"])
    assert read.text.count(cards.BEGIN) == read.text.count(cards.END) == 1


def test_our_part_is_replaced_where_it_stands_and_the_users_text_stays():
    text = cards.with_section("# Mine\n\nbefore", card())
    text = text.replace("# Mine", "# Still mine") + "\n\nafter\n"
    again = cards.with_section(text, card(variant="mini"))
    assert again.startswith("# Still mine\n\nbefore\n\n" + cards.BEGIN)
    assert again.endswith(cards.END + "\n\nafter\n")
    assert "`mini`" in again
    assert "`bone`" not in again
    assert cards.with_section(again, card(variant="mini")) == again


def test_a_converted_folder_has_a_card(tmp_path):
    adapter = Adapter(variants.get("bone"), {"blocks.0.att.key": torch.ones(4, 8)}, {}, {}, "org/model")
    for name in ("peft", "miss", "rwkv-peft"):
        (tmp_path / name).mkdir()
        assert "README.md" in formats.write(formats.get(name), adapter, tmp_path / name, is_file=False)
        data = ModelCard.load(tmp_path / name / "README.md").data
        assert data.base_model == "org/model"
        assert data.library_name == ("flashbone" if name == "rwkv-peft" else "peft")


def section(folder: Path) -> str:
    text = (folder / "README.md").read_text()
    assert text.count(cards.BEGIN) == text.count(cards.END) == 1
    return text[text.index(cards.BEGIN) :]


def test_saved_adapters_carry_a_card_each(tmp_path):
    model = get_peft_model(
        tiny_llama(), BoneConfig(r=4, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2})
    )
    model.add_adapter("other", BoneConfig(r=8, variant="bat-row", target_modules=["v_proj"]))
    for _ in range(2):  # the second time, the cards are there
        model.save_pretrained(tmp_path)
        assert "`bone`" in section(tmp_path)
        assert "| r | 2, 4 |" in section(tmp_path)
        assert "`bat-row`" in section(tmp_path / "other")
        assert "`v_proj`" in section(tmp_path / "other")
        assert {"bone", "flashbone"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
    model.save_pretrained(tmp_path / "chosen", selected_adapters=["other"])
    assert not (tmp_path / "chosen" / "adapter_config.json").exists()
    assert "`bat-row`" in section(tmp_path / "chosen" / "other")
    model.save_pretrained(tmp_path / "silent", is_main_process=False)
    assert not list((tmp_path / "silent").rglob("README.md"))
    assert type(PeftModel.from_pretrained(tiny_llama(), tmp_path / "other")).__name__ == "PeftModel"


def test_what_users_write_into_a_saved_card_stays(tmp_path):
    model = get_peft_model(tiny_llama(), BoneConfig(r=4, target_modules=["q_proj"]))
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n")
    model.save_pretrained(tmp_path)
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.license == "mit"
    assert "# Mine" in read.text
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first


def test_cards_of_other_methods_are_as_peft_writes_them(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "flashbone" not in text
    assert "PEFT" in text


def test_the_card_of_a_trainer_has_our_part_once(tmp_path):
    model = get_peft_model(tiny_bert(), BoneConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model, args)
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card(model_name="mine")
    assert ModelCard.load(tmp_path / "README.md").data.model_name == "mine"
    assert "`query`" in section(tmp_path)
