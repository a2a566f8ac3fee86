"""Rows with images, on tiny random models of two families with processors made here: trained, merged, loaded again."""

import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from training_runs import metrics_of, recipe_for
from transformers import AutoModelForImageTextToText, AutoProcessor

from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.generation.rows import read_asked
from flashbone.train.data.formats import open_examples
from flashbone.train.data.images import convert
from flashbone.train.data.loading import load_test_rows
from flashbone.train.run import train
from helpers.tiny_llama import questions
from helpers.tiny_vision import FAMILIES, write_tiny_vision


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: write_tiny_vision(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture
def rows(tmp_path):
    """Red and blue squares, as paths and as bytes beside the data; what is learned is their colour."""
    for name in ("red", "blue"):
        Image.new("RGB", (28, 28), name).save(tmp_path / f"{name}.png")
    listed = []
    for number in range(12):
        colour = ("red", "blue")[number % 2]
        said = "what was it ?" if number % 3 else "<image> what was it ?"
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": f"it was {colour} ."}]
        listed.append({"messages": turns, "images": [f"{colour}.png"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return tmp_path / "rows.jsonl"


def logits(model, processor, colour="red"):
    said = [{"type": "image"}, {"type": "text", "text": "what was it ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", (28, 28), colour)], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_learns_from_images_and_its_model_is_loaded_again(family, models, rows, tmp_path):
    training = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True}
    adapter = {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    recipe = recipe_for(models[family], rows, tmp_path / "run", adapter=adapter, training=training, merge=True)
    result = train(recipe)
    assert result.summary["eval_loss_after"] < result.summary["eval_loss_before"] - 0.1
    assert metrics_of(recipe.output)[-1]["step"] == 6

    folder = Path(recipe.output)
    base = AutoModelForImageTextToText.from_pretrained(models[family])
    processor = AutoProcessor.from_pretrained(folder / "adapter")
    before = logits(base, processor)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    got = logits(adapted, processor)
    assert (got - before).abs().max() > 0.05
    assert (got - logits(adapted, processor, "blue")).abs().max() > 1e-4
    merged = AutoModelForImageTextToText.from_pretrained(folder / "merged")
    torch.testing.assert_close(
        logits(merged, AutoProcessor.from_pretrained(folder / "merged")), got, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_trains_such_a_model_too(family, models, jsonl, tmp_path):
    adapter = {"r": 8, "target_modules": r".*language_model.*\.(q|v|down)_proj"}
    training = {"max_steps": 6, "learning_rate": 1e-2, "use_cpu": True}
    recipe = recipe_for(models[family], jsonl(questions(40)), tmp_path / "run", adapter=adapter, training=training)
    summary = train(recipe).summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1


def test_images_may_be_bytes_and_have_their_places_in_the_turns():
    Image.new("RGB", (4, 4)).save(file := io.BytesIO(), format="PNG")
    places = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image", "image": "ignored"}]
    turns = [{"role": "user", "content": places}, {"role": "assistant", "content": "yes"}]
    images = [{"bytes": file.getvalue(), "path": "x.png"}, Image.new("RGB", (4, 4))]
    example = convert({"messages": turns, "images": images, "system": "be short"})
    messages = example["conversation"]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    assert [image["bytes"][:4] for image in example["images"]] == [b"\x89PNG"] * 2


TURNS = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "it was red ."}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS, "images": ["gone.png"]}, "row 1: no image gone.png beside the data"),
        ({"messages": TURNS, "images": ["rows.jsonl"]}, "row 1: image .* cannot be read"),
        ({"messages": TURNS, "images": ["https://example.org/a.png"]}, "a path on this machine .* wanted"),
        ({"messages": TURNS, "images": [3]}, "an image is of type int"),
        (
            {"messages": [{"role": "user", "content": "<image> a <image>"}, TURNS[1]], "images": ["red.png"]},
            "places for 2 images, but 'images' has 1",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": "<image> x"}], "images": ["red.png"]},
            "an answer holds an image",
        ),
    ],
)
def test_images_that_cannot_be_learned_are_refused(row, message, models, rows, tmp_path):
    rows.write_text(json.dumps(row) + "\n")
    recipe = recipe_for(models["llava"], rows, tmp_path / "run", training={"use_cpu": True})
    recipe.data.eval = None
    with pytest.raises(FlashboneError, match=message):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_llavas_turns_are_read_and_pictures_beside_them_are_not_left_out():
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    row = {"conversations": turns, "image": "red.png"}
    with pytest.raises(FormatError, match=r"leaves it out, or \{messages: conversations, images: image\}"):
        list(open_examples(iter([("d:1", row)]), "sft", "d").examples)
    messages = convert({"messages": turns, "images": "red.png"})["conversation"]["messages"]
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "\nwhat ?"}]


def test_commands_that_only_read_texts_refuse_images(rows):
    with pytest.raises(FormatError, match="holds images, and only texts are scored here"):
        load_test_rows(rows, "sft", {})
    with pytest.raises(FormatError, match="is about images, and only texts are answered here"):
        read_asked(rows, ())


def test_a_model_without_a_processor_is_refused(llama, rows, tmp_path):
    with pytest.raises(ConfigError, match="the data hold images, but the model has no processor"):
        train(recipe_for(llama, rows, tmp_path / "run", training={"use_cpu": True}))
