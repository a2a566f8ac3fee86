"""The cards beside adapters: of converted ones, and of those that a live model saves."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from flashbone import BoneConfig, variants
from flashbone.cli import main
from flashbone.conversion import card_of, convert
from flashbone.files import cards, peft
from flashbone.files.adapter import Adapter
from flashbone.files.formats import AdapterCard
from flashbone.files.reading import FORMATS
from flashbone.rwkv import from_pth
from helpers.adapter_folders import tiny_bert, tiny_gpt2, tiny_llama
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, close, same_bits
from helpers.rwkv import write_rwkv


def card(format="peft", **fields) -> AdapterCard:
    given = {
        "format": FORMATS[format],
        "variant": "bone",
        "r": (4, 64),
        "targets": ("layers.0.q", "layers.1.q", "v"),
        "base": "a/b",
        "linear_only": True,
        "fits_lora": True,
        "fits_rwkv": True,
    }
    return AdapterCard(**(given | fields))


def commands(text: str) -> list[str]:
    return re.findall(r"^flashbone \w+ .*$", text, re.MULTILINE)


def ways_out(text: str) -> set[str]:
    return set(re.findall(r"^flashbone convert .* --to ([a-z-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_card_says_what_the_adapter_is_and_which_ways_lead_out(variant):
    page = cards.page(card(variant=variant, r=(64,)))
    assert f"- variant: `{variant}` (Bone family)" in page
    assert "- r: 64\n- layers: `layers.*.q` (2), `v`\n- base model: `a/b`\n" in page
    assert "| | |" not in page
    assert ("PEFT 0.14 to 0.18 loads it as it is" in page) == (variant in ("bone", "bat-col"))
    found = commands(page)
    assert ("flashbone convert . ../miss --to miss" in found) == (variant in ("bone", "mini", "bat-col"))
    assert ("flashbone convert . ../adapter.pth --to rwkv-peft" in found) == (variant in ("bone", "bat-row"))
    exact = variant in ("bone", "mini")
    lora = "flashbone convert . ../lora --to lora --base a/b" + ("" if exact else " --error 0.01")
    assert lora in found
    assert found[-1] == "flashbone merge a/b . ../merged"


@pytest.mark.parametrize(
    ("fields", "ways"),
    [
        ({"r": (4, 64)}, {"lora", "rwkv-peft"}),
        ({"linear_only": False, "fits_rwkv": False}, {"lora"}),
        ({"linear_only": False, "fits_lora": False, "fits_rwkv": False}, set()),
        ({"fits_rwkv": False}, {"miss", "lora"}),
    ],
)
def test_a_card_leaves_out_the_ways_that_would_be_refused(fields, ways):
    page = cards.page(card(**({"r": (4,)} | fields)))
    assert ways_out(page) == set(re.findall("`--to ([a-z-]+)`", page)) == ways
    assert ("PEFT 0.14 to 0.18" in page) == ("miss" in ways)
    assert "Merged into its base" in page
    assert commands(page)[-1] == "flashbone merge a/b . ../merged"


@pytest.mark.parametrize(
    ("fields", "ways"),
    [
        ({}, {"miss", "lora", "rwkv-peft"}),
        ({"blocks": {"x.blocks.0.att.key": torch.ones(4, 8), "blocks.0.att.key": torch.ones(4, 8)}}, {"miss", "lora"}),
        ({"blocks": {"blocks.0.att.key": torch.ones(4, 8), "head": torch.ones(2, 8)}}, {"rwkv-peft"}),
        ({"blocks": {"x.att.key": torch.ones(4, 8)}, "transposed": frozenset(["x.att.key"])}, {"lora"}),
        ({"transposed": frozenset(["blocks.0.att.key"])}, set()),
        ({"parameters": frozenset(["blocks.0.att.key"])}, set()),
        ({"replacements": {"blocks.0.att.time_x": torch.ones(4)}}, {"rwkv-peft"}),
        ({"replacements": {"classifier.bias": torch.ones(4)}}, {"miss", "lora"}),
    ],
)
def test_the_card_of_a_folder_names_the_formats_that_hold_the_adapter(tmp_path, fields, ways):
    single = "blocks.0.att.time_x" in fields.get("replacements", {})
    config = {"parameters_to_save": ["blocks.0.att.time_x"]} if single else {}
    given = {
        "blocks": {"model.blocks.0.att.key": torch.ones(4, 8)} if not fields else {"blocks.0.att.key": torch.ones(4, 8)}
    }
    adapter = Adapter(variants.get("bone"), **({"replacements": {}, "config": config} | given | fields))
    text = cards.page(card_of(FORMATS["peft"], adapter))
    assert ways_out(text) == ways
    for form in ("miss", "rwkv-peft"):
        if form in ways:
            (tmp_path / form).mkdir()
            FORMATS[form].write(adapter, tmp_path / form / "adapter.pth" if form == "rwkv-peft" else tmp_path / form)


@pytest.mark.parametrize(
    ("form", "word"), [("miss", "PEFT 0.17"), ("lora", "Any version of PEFT"), ("rwkv-peft", "RWKV-PEFT")]
)
def test_cards_of_other_formats_say_how_those_are_loaded(form, word):
    page = cards.page(card(format=form, variant=None if form == "lora" else "bone"))
    assert word in page
    assert "import flashbone" not in page
    assert ("plain LoRA" in page) == (form == "lora")


FOLDER, FILE, UNKNOWN = "org/model", "/models/rwkv.pth", None


@pytest.mark.parametrize("base", [FOLDER, FILE, UNKNOWN])
@pytest.mark.parametrize("form", ["peft", "miss", "lora"])
def test_adapters_of_rwkv_are_loaded_onto_flashbones_classes(form, base):
    """A base that nobody named, under RWKV's own names, is most likely one of its author's files."""
    page = cards.page(card(format=form, base=base, is_rwkv=True))
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    compile(code, "card", "exec")
    if base == FOLDER:
        assert code.startswith("import flashbone")
        assert 'AutoModelForCausalLM.from_pretrained("org/model")' in code
    else:
        assert code.startswith("from flashbone.rwkv import from_pth")
        assert 'base = from_pth("BASE.pth")' in code
        assert "AutoModel" not in page
    line = "org/model . ../merged" if base == FOLDER else "BASE.pth . ../merged.pth"
    assert (f"flashbone merge {line}" in page) == (form != "lora")
    assert ways_out(page) == {"peft": {"rwkv-peft"}, "miss": {"peft"}, "lora": set()}[form]
    for claim in ("loads it as it is", "without flashbone:", "every engine", "--for vllm"):
        assert claim not in page


@pytest.mark.parametrize("base", [FOLDER, FILE, UNKNOWN])
def test_the_card_of_an_rwkv_peft_file_merges_into_what_its_base_is(base):
    page = cards.page(card(format="rwkv-peft", base=base, is_rwkv=True))
    line = "org/model adapter.pth ../merged" if base == FOLDER else "BASE.pth adapter.pth ../merged.pth"
    assert commands(page) == ["flashbone convert adapter.pth ../peft --to peft", f"flashbone merge {line}"]


@pytest.mark.parametrize("version", [7, 6])
def test_the_card_of_an_adapter_on_a_pth_file_loads_it(tmp_path, monkeypatch, version):
    base = write_rwkv(tmp_path / "base.pth", version, layers=1)
    single = {7: "k_k", 6: "time_decay"}[version]
    config = BoneConfig(r=4, target_modules=["att.key"], modules_to_save=["ln_x"], parameters_to_save=[single])
    model = get_peft_model(from_pth(base), config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    text = section(tmp_path / "adapter")
    assert f"- base model: `{base}`" in text
    assert ways_out(text) == {"rwkv-peft"}
    code = text[text.index("```python") + 9 : text.index("```\n\n### Load without")]
    monkeypatch.chdir(tmp_path / "adapter")
    found: dict = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "PeftModel"
    ids = torch.arange(5)[None]
    got, want = (one.eval()(input_ids=ids).logits for one in (found["model"], model))
    assert same_bits(got, want, Promise.SAME_PRODUCT)


@pytest.mark.parametrize("base", [None, "org/model", "/a path/: colons", 'a"b\n---\nx: [y]', "- x", "yes", "a|b`c"])
def test_the_hub_reads_the_head_of_every_card(tmp_path, base):
    (tmp_path / "README.md").write_text(cards.page(card(base=base)))
    read = ModelCard.load(tmp_path / "README.md")
    on_hub = base if base in ("org/model", "yes") else None  # the hub takes no other names
    assert read.data.base_model == on_hub
    assert read.data.tags == ["bone", "flashbone", *([f"base_model:adapter:{on_hub}"] if on_hub else [])]
    assert (read.data.library_name, read.data.pipeline_tag, read.data.license) == ("peft", "text-generation", "unknown")
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


def test_users_text_after_a_stray_marker_stays():
    stray = f"{cards.END} one {cards.BEGIN} two"
    once = cards.with_section(stray, card())
    assert once.startswith(f"{stray}\n\n{cards.BEGIN}\n")
    assert cards.with_section(once, card()) == once
    assert cards.with_section(once + " three", card(variant="mini")).startswith(f"{stray}\n\n{cards.BEGIN}\n")


def test_a_converted_folder_has_a_card(tmp_path):
    (tmp_path / "a").mkdir()
    blocks = {"blocks.0.att.key": torch.ones(4, 8)}
    peft.write(Adapter(variants.get("bone"), blocks, {}, {}, "org/model"), tmp_path / "a")
    for name in ("peft", "miss", "rwkv-peft"):
        assert "README.md" in convert(tmp_path / "a", tmp_path / name, name).files
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
        assert "- r: 2, 4\n- layers: `model.layers.*.self_attn.q_proj` (2)\n" in section(tmp_path)
        assert "`bat-row`" in section(tmp_path / "other")
        assert "self_attn.v_proj`" in section(tmp_path / "other")
        assert {"bone", "flashbone"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
    model.save_pretrained(tmp_path / "chosen", selected_adapters=["other"])
    assert not (tmp_path / "chosen" / "adapter_config.json").exists()
    assert "`bat-row`" in section(tmp_path / "chosen" / "other")
    model.save_pretrained(tmp_path / "silent", is_main_process=False)
    assert not list((tmp_path / "silent").rglob("README.md"))
    assert type(PeftModel.from_pretrained(tiny_llama(), tmp_path / "other")).__name__ == "PeftModel"


@pytest.mark.parametrize(
    ("maker", "fields", "ways"),
    [
        (tiny_llama, {"target_modules": ["q_proj"]}, {"miss", "lora"}),
        (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}, {"lora"}),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 2)), {"target_modules": ["0"]}, set()),
        (tiny_gpt2, {"target_modules": ["c_attn", "wte"]}, {"lora"}),
    ],
)
def test_the_card_of_a_live_adapter_names_the_formats_that_hold_it(tmp_path, maker, fields, ways):
    model = get_peft_model(maker(), BoneConfig(r=4, **fields))
    model.create_or_update_model_card(tmp_path)
    assert ways_out(section(tmp_path)) == ways


TRL = """---
licence: license
tags:
- trl
---
# Model Card for mine

This is a fine-tuned version of [None](https://huggingface.co/None).

## Quick start

generator = pipeline("text-generation", model="None", device_map="auto")

## Uses

[More Information Needed]

## Training procedure

Trained with SFT.
"""


def test_our_part_comes_back_into_a_card_that_trl_wrote_over_it(tmp_path):
    model = get_peft_model(tiny_llama(), BoneConfig(r=4, target_modules=["q_proj"]))
    (tmp_path / "README.md").write_text(TRL)
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "self_attn.q_proj`" in section(tmp_path)
    assert "# Model Card for mine\n\nThis is a fine-tuned version of its base.\n\n## Training procedure\n" in text
    assert not re.search("None|More Information Needed|## Uses|licence", text)


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
    assert "self.query`" in section(tmp_path)
    assert not re.search("more information needed", (tmp_path / "README.md").read_text(), re.IGNORECASE)


def pasted(folder: Path, monkeypatch) -> dict:
    """Everything on the card of a folder, pasted there line by line; the names that its Python leaves."""
    monkeypatch.chdir(folder)
    text, names = section(folder), {}
    for kind, block in re.findall(r"^```(python|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(block, names)
        else:
            assert [main(shlex.split(line)[1:]) for line in block.splitlines()] == [0] * len(block.splitlines())
    return names


@pytest.mark.parametrize("is_classifier", [False, True])
def test_all_lines_of_a_card_work_when_they_are_pasted(tmp_path, monkeypatch, is_classifier):
    base, config = tmp_path / "a base", {"target_modules": "all-linear", "init_weights": False}
    (tiny_bert(classifier=False) if is_classifier else tiny_llama()).save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    if is_classifier:
        model = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=5),
            BoneConfig(r=4, task_type="SEQ_CLS", **config),
        )
    else:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), BoneConfig(r=4, **config))
    model.save_pretrained(tmp_path / "adapter")
    data = ModelCard.load(tmp_path / "adapter/README.md").data
    assert (data.base_model, data.license) == (None, "mit")
    assert data.pipeline_tag == ("text-classification" if is_classifier else "text-generation")
    names = pasted(tmp_path / "adapter", monkeypatch)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        want = model.eval()(ids).logits
        assert close(names["model"].base_model.model.eval()(ids).logits, want)
        auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
        assert close(auto.from_pretrained(tmp_path / "merged").eval()(ids).logits, want)
    for name in () if is_classifier else ("miss", "lora"):
        bare = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            assert close(PeftModel.from_pretrained(bare, tmp_path / name).eval()(ids).logits, want)


@pytest.mark.parametrize(
    ("fields", "code", "tag"),
    [
        ({"task_type": "SEQ_2_SEQ_LM"}, "AutoModelForSeq2SeqLM.from_pretrained", "text2text-generation"),
        ({"architecture": "BertForMaskedLM"}, "AutoModelForMaskedLM.from_pretrained", "fill-mask"),
        ({"architecture": "UNet2DConditionNet"}, "base = ...", None),
        ({"task_type": "SEQ_CLS", "labels": 3}, "num_labels=3", "text-classification"),
        ({"base": "a b/model.gguf"}, "AutoModelForCausalLM", "text-generation"),
    ],
)
def test_a_card_loads_the_base_as_its_task_wants_it(fields, code, tag):
    made = card(**fields)
    page = cards.page(made)
    assert code in page
    assert (f"pipeline_tag: {tag}" in page) == (tag is not None)
    in_python = tag in (None, "text-classification") or "base" in fields
    assert ("merge_and_unload" in page) == in_python
    assert any(line.startswith("flashbone merge") for line in commands(page)) == (not in_python)


def test_a_run_is_added_once_and_cannot_end_its_block(tmp_path):
    file = tmp_path / "README.md"
    cards.put(card(), file)
    cards.put_run(file, {"held-out loss": "2.0000 before, 1.0000 after"}, "output: '```'\n")
    cards.put_run(file, {"held-out loss": "2.0000 before, 0.5000 after"}, "output: '```'\n")
    cards.put(card(), file)
    text = file.read_text()
    assert text.count("## Training") == text.count(cards.RUN) == text.count(cards.BEGIN) == 1
    assert "- held-out loss: 2.0000 before, 0.5000 after" in text
    assert "````yaml\noutput: '```'\n````" in text
