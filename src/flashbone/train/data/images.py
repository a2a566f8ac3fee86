"""Rows of conversations about images: where their images are, and how TRL's vision path takes them."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError, FormatError
from flashbone.train.data.conversations import answers, conversation, keys_of, kind

if TYPE_CHECKING:
    from datasets import Dataset

MARK = "<image>"  # in a text: the place of an image, as LLaVA's data has it
LARGEST = 2**26  # pixels of an image


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """An example of a row with messages and images; FormatError with what is wrong in it."""
    images = row["images"] if isinstance(row["images"], list) else [row["images"]]
    turns = [dict(turn) if isinstance(turn, dict) else turn for turn in row["messages"] or ()]
    parted: dict[int, list[dict[str, str]]] = {}
    for number, turn in enumerate(turns):
        said = keys_of(turn)[1] if isinstance(turn, dict) else "content"
        parts = _parts(turn.get(said)) if isinstance(turn, dict) else []
        if {"type": "image"} in parts:
            parted[number] = parts
            turn[said] = "".join(part.get("text", "") for part in parts) or MARK
    example = conversation(turns, system=row.get("system"), kwargs=row.get("chat_template_kwargs"))
    messages = example["conversation"]["messages"]
    shift = len(messages) - len(turns)  # a system prompt of the row's own went before
    for number, parts in parted.items():
        messages[number + shift]["content"] = parts
    places = sum(part["type"] == "image" for parts in parted.values() for part in parts)
    if places not in (0, len(images)):
        raise FormatError(f"its turns have places for {places} images, but 'images' has {len(images)}")
    if parted and any(messages[number + shift]["role"] == "assistant" for number in parted):
        raise FormatError("an answer holds an image; models write text")
    return example | {"images": [_stored(image) for image in images]}


def _parts(content: Any) -> list[dict[str, str]]:
    """The content of a turn as parts, each a text or the place of an image."""
    if isinstance(content, str):
        texts = content.split(MARK)
        parts: list[dict[str, str]] = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        return [part for part in parts if part.get("text") != ""]
    made = []
    for part in content if isinstance(content, list) else ():
        is_image = isinstance(part, dict) and part.get("type") == "image"
        made.append({"type": "image"} if is_image else {"type": "text", "text": _text(part)})
    return made


def _text(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise FormatError(f"a part of a turn is {kind(part)}; a text or an image was wanted")
    return text


def _stored(image: Any) -> dict[str, Any]:
    """An image as Arrow stores it: its path, or its bytes."""
    if isinstance(image, str) and image and "://" not in image:
        return {"path": image, "bytes": b""}
    if isinstance(image, bytes):
        return {"path": "", "bytes": image}
    if isinstance(image, dict) and image.keys() <= {"path", "bytes"} and (image.get("bytes") or image.get("path")):
        return {"path": "", "bytes": image["bytes"]} if image.get("bytes") else _stored(image["path"])
    if not isinstance(image, str | dict) and hasattr(image, "save"):  # what datasets has decoded
        image.save(file := io.BytesIO(), format="PNG")
        return {"path": "", "bytes": file.getvalue()}
    raise FormatError(f"an image is {kind(image)}; a path on this machine or an image's bytes were wanted")


def has_images(rows: Any) -> bool:
    """Whether these rows are about images."""
    return "images" in (getattr(rows, "column_names", None) or ())


def for_trl(rows: "Dataset", folders: Iterable[Path]) -> "Dataset":
    """A row with prompt, completion and images for each learned answer; images are opened when they are used.

    Args:
        rows: Examples.
        folders: Where paths of images may begin; the current folder comes last.

    Raises:
        FormatError: an image does not exist, or is none.
    """
    from datasets import Dataset, Features, Image, List, Value

    folders, made = [*folders, Path()], []
    listed: Any = rows
    for number, row in enumerate(listed):
        if row.get("conversation") is None:
            raise FormatError("rows with images and other formats cannot be mixed; give the others as messages, too")
        images = [
            {"path": _located(image["path"], folders, number), "bytes": image["bytes"] or None}
            for image in row["images"] or ()
        ]
        for image in images:
            _check_image(image, number)
        made_of_row = answers(row["conversation"])
        if any("tools" in answer for answer in made_of_row):
            raise FormatError(f"row {number + 1}: has images and tools; leave one of them out")
        has_places = _places(made_of_row[-1]["prompt"]) > 0
        for answer in made_of_row:
            seen = images[: _places(answer["prompt"])] if has_places else images
            texts = {name: json.dumps(answer[name]) for name in ("prompt", "completion")}
            made.append({**texts, "images": seen})
    features = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
    return Dataset.from_list(made, features=features).with_transform(_decoded)


def _places(turns: list[dict[str, Any]]) -> int:
    """How many images turns have places for."""
    contents = [turn["content"] for turn in turns if isinstance(turn["content"], list)]
    return sum(part["type"] == "image" for content in contents for part in content)


def _decoded(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    texts = {name: [json.loads(value) for value in batch[name]] for name in ("prompt", "completion") if name in batch}
    images = (
        {"images": [[image.convert("RGB") for image in row] for row in batch["images"]]} if "images" in batch else {}
    )
    return texts | images


def _located(path: str, folders: list[Path], number: int) -> str | None:
    if not path:
        return None
    for folder in folders:
        if (place := folder / path).is_file():
            return str(place)
    raise FormatError(f"row {number + 1}: no image {path} beside the data or in the current folder")


def _check_image(image: dict[str, Any], number: int) -> None:
    from PIL import Image

    source = image["path"] or io.BytesIO(image["bytes"])
    try:
        with contextlib.closing(Image.open(source)) as opened:
            width, height = opened.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise FormatError(f"row {number + 1}: image {image['path'] or 'of bytes'} cannot be read: {error}") from None
    if width * height > LARGEST:
        raise FormatError(f"row {number + 1}: an image of {width} x {height} pixels; at most {LARGEST:,} were wanted")


def ends_of(rows: "Dataset", processor: Any) -> Counter[int]:
    """The tokens in which answers end, as the chat template writes them.

    Raises:
        ConfigError: an answer has no end that generation could stop at.
    """
    from datasets import Image, List
    from trl.data_utils import apply_chat_template, prepare_multimodal_messages

    ends: Counter[int] = Counter()
    special = set(processor.tokenizer.all_special_ids)
    stored: Any = rows.with_format(None).cast_column("images", List(Image(decode=False)))
    for row in stored:
        parts = {
            "prompt": prepare_multimodal_messages(json.loads(row["prompt"]), images=[None] * len(row["images"])),
            "completion": prepare_multimodal_messages(json.loads(row["completion"]), images=[]),
        }
        ids = processor.tokenizer(apply_chat_template(parts, processor)["completion"], add_special_tokens=False)
        marks = [token for token in ids["input_ids"] if token in special]
        if not marks:
            raise ConfigError("answers end in no token that generation could stop at; use another chat template")
        ends[marks[-1]] += 1
    return ends
