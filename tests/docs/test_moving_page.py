"""docs/moving.md: its Python and its commands run one after the other, and its tables of fields are the classes'."""

import ast
import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftConfig
from safetensors.torch import load_file

from flashbone import BoneConfig
from flashbone.train.recipe import load_recipe
from helpers.adapter_folders import blocks_for, write_adapter, write_config
from helpers.comparison import Promise, close, same_bits
from helpers.pages import ROOT, blocks, run_page
from helpers.rwkv import write_rwkv
from helpers.tiny_llama import write_tiny_llama

PAGE = (ROOT / "docs" / "moving.md").read_text()
OLD_BONE = ROOT / ".venv" / "peft-0.18.1" / "peft" / "tuners" / "bone" / "config.py"
TRAINING = "# ... training ..."
TOKENS = torch.arange(2, 12).view(2, 5)


def fill(model: torch.nn.Module) -> None:
    """In the place of a training: random values for all that is trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8


def rwkv_adapter(file: Path) -> None:
    """As RWKV-PEFT saves it in its mode bat: r = 8, a LayerNorm trained along."""
    state = {f"blocks.{n}.att.{name}.disha": torch.randn(4, 8, 8) / 8 for n in range(2) for name in ("key", "value")}
    state |= {f"blocks.{n}.ln1.{name}": torch.ones(32) for n in range(2) for name in ("weight", "bias")}
    torch.save(state, file)


@pytest.fixture
def place(place) -> Path:
    """A folder with what the page names: a base, an adapter of PEFT 0.18, an RWKV model and an adapter of it."""
    from transformers import LlamaForCausalLM

    write_tiny_llama(place / "base")
    adapted = blocks_for(LlamaForCausalLM.from_pretrained("base"), "bat-col", ("q_proj", "v_proj"), 8)
    folder = write_adapter(place / "old-adapter", "bat-col", adapted)
    write_config(folder, r=8, init_weights="bat", mini_r=None, target_modules=["q_proj", "v_proj"], bias="none")
    write_rwkv(place / "RWKV.pth", 7, layers=2)
    rwkv_adapter(place / "rwkv-0.pth")
    return place


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_stored(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name], Promise.STORED) for name in first)


@pytest.mark.slow
def test_python_and_commands_of_the_page_run_one_after_the_other(place, capsys):
    run = run_page("docs/moving.md", replaced={TRAINING: "fill(model)"}, names={"fill": fill})
    names = run.names
    assert [run.ran.count(language) for language in ("python", "bash", "yaml")] == [5, 3, 1]
    assert run.commands == ["flashbone"] * 7
    assert close(logits(names["theirs"]), logits(names["ours"]))
    assert_stored(*(load_file(place / name / "adapter_model.safetensors") for name in ("miss-again", "miss-adapter")))
    said = capsys.readouterr().out
    assert "my-lora: 14 modules, bone to lora, rank 16, exact" in said


def test_adapters_come_back_to_the_bit(place):
    from flashbone import convert

    convert("rwkv-0.pth", "rwkv-adapter", "peft")
    convert("rwkv-adapter", "rwkv-1.pth", "rwkv-peft")
    assert_stored(*(torch.load(name, weights_only=True) for name in ("rwkv-0.pth", "rwkv-1.pth")))
    convert("old-adapter", "miss", "miss")
    convert("miss", "old-again", "peft")
    assert_stored(*(load_file(f"{name}/adapter_model.safetensors") for name in ("old-adapter", "old-again")))


def test_a_free_lora_is_refused_as_the_page_says(place):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from flashbone import convert
    from flashbone.errors import FormatError

    config = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config).save_pretrained("free")
    with pytest.raises(FormatError, match="a LoRA with a trained A is not a Bone adapter"):
        convert("free", "out", "peft")


def own_fields(cls: type) -> set[str]:
    return {item.name for item in dataclasses.fields(cls)} - {item.name for item in dataclasses.fields(PeftConfig)}


def table(name: str) -> list[tuple[set[str], set[str]]]:
    """The fields in the first two columns of the table behind this mark, without the values that they are given."""
    part = PAGE[PAGE.index(f"<!-- fields: {name} -->") :]
    lines = part.split("\n\n")[1].splitlines()[2:]
    rows = [line.split("|")[1:3] for line in lines]
    return [tuple({f.partition("=")[0] for f in re.findall(r"`([^`]+)`", cell)} for cell in row) for row in rows]  # pyright: ignore[reportReturnType]


def test_the_fields_of_miss_are_all_there_and_ours_exist():
    rows = table("MissConfig")
    assert set().union(*(theirs for theirs, _ in rows)) == own_fields(MissConfig)
    assert set().union(*(ours for _, ours in rows)) <= own_fields(BoneConfig)
    defaults = MissConfig(), BoneConfig()
    assert (defaults[0].r, defaults[0].mini_r, defaults[0].bias) == (defaults[1].r, defaults[1].mini_r, "none")


def test_the_fields_of_lora_exist_and_ours_do():
    rows = table("LoraConfig")
    theirs = set().union(*(theirs for theirs, _ in rows))
    assert theirs <= own_fields(LoraConfig)
    assert {"r", "lora_alpha", "lora_dropout", "target_modules", "bias"} <= theirs
    assert set().union(*(ours for _, ours in rows)) <= own_fields(BoneConfig)
    for absent, ours in rows:
        if not ours and "target_modules" not in absent:  # there they have the same names
            assert not absent & own_fields(BoneConfig)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        BoneConfig(use_dora=True)  # pyright: ignore[reportCallIssue]


@pytest.mark.skipif(
    not OLD_BONE.is_file(), reason="peft 0.18.1 is not installed beside the environment (make test does)"
)
def test_the_fields_of_the_old_bone_are_all_there():
    (old,) = [n for n in ast.parse(OLD_BONE.read_text()).body if isinstance(n, ast.ClassDef)]
    fields = {n.target.id for n in old.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    rows = table("BoneConfig of PEFT 0.14 to 0.18")
    assert set().union(*(theirs for theirs, _ in rows)) == fields
    assert set().union(*(ours for _, ours in rows)) <= own_fields(BoneConfig)


def test_the_recipe_has_fields_that_exist(tmp_path):
    (block,) = [block.text for block in blocks("docs/moving.md") if block.language == "yaml"]
    file = tmp_path / "recipe.yaml"
    file.write_text(block)
    assert load_recipe(file).adapter == {"variant": "bat-row", "r": 64}


def two_miss(first: dict, second: dict):
    from peft import get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 12)), MissConfig(target_modules=["0"], **first))
    fill(model)
    model.add_adapter("second", MissConfig(target_modules=["0"], **second))
    return model


def test_what_is_said_of_miss_is_what_it_does():
    """The faults that the page names, in the PEFT that is installed."""
    x = torch.randn(3, 12)
    bat = {"r": 4, "init_weights": "bat"}
    model = two_miss(bat | {"miss_dropout": 0.9}, bat)
    assert same_bits(model.train()(x), model(x), Promise.SAME_PRODUCT)  # dropout is ignored
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.base_model.model[0].scale_layer(0.5)
    assert "Scaling operation for MiSS not supported" in str(caught[0].message)
    before = model(x)
    assert same_bits(model(x, adapter_names=["second"] * 3), before, Promise.SAME_PRODUCT)  # ignored
    mixed = two_miss(bat, {"r": 4})
    mixed.base_model.set_adapter(["default", "second"])
    with pytest.raises((RuntimeError, ValueError)):
        mixed(x)
    with pytest.raises(ValueError, match="must be fully divisible"):
        two_miss({"r": 5, "init_weights": "bat"}, bat)
