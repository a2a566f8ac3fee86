"""The messages that docs/troubleshooting.md quotes are those of the sources, word for word."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers

import flashbone
from flashbone import BoneConfig
from flashbone.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
VARIES = "…"
HOSTS = {
    "PEFT": [Path(peft.__file__).parent, ("config.py", "mapping_func.py", "peft_model.py", "tuners/tuners_utils.py")],
    "transformers": [
        Path(transformers.__file__).parent,
        ("training_args.py", "trainer_utils.py", "integrations/peft.py"),
    ],
}
# Not written anywhere as a text: made by Python, by torch's C++, or of packages that are not here.
ELSEWHERE = {"Python", "torch", "vLLM", "PEFT 0.18", "transformers 4"}
MADE_BY_PYTHON = {"KeyError: 'BONE'"}


def quoted() -> list[tuple[str, str]]:
    """Each message of the tables, and whose it is."""
    tables = "\n".join(re.findall(r"^\| message \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, re.M))
    cells = re.findall(r"^\| `([^`]+)`(?: \(([^)]+)\))? \|", tables, re.M)
    rows = re.findall(r"^\| ", tables, re.M)
    assert len(cells) == len(rows), "a row does not begin with a message"
    return [(message, whose or "flashbone") for message, whose in cells]


def texts(file: Path) -> Iterator[str]:
    """Every string in a file; what is put into it varies."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else VARIES for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def sources(whose: str) -> list[tuple[str, str]]:
    """File and all its strings, below one another."""
    if whose == "flashbone":
        root = Path(flashbone.__file__).parent
        files = sorted(root.rglob("*.py"))
    else:
        root, names = HOSTS[whose]
        files = [root / name for name in names]
    return [(str(file.relative_to(root)), "\n".join(texts(file))) for file in files]


def constant_parts(message: str) -> list[str]:
    return [part for part in (piece.strip() for piece in message.split(VARIES)) if re.search(r"\w", part)]


def places(message: str, whose: str) -> list[str]:
    """Files in which every constant part of a message stands."""
    parts = constant_parts(message)
    return [file for file, text in sources(whose) if all(part in text for part in parts)]


def test_every_message_stands_in_the_source_that_is_said_to_write_it():
    messages = quoted()
    assert len(messages) > 50
    ours = [message for message, whose in messages if whose == "flashbone"]
    assert len(ours) > 35
    lost = [
        f"{message} ({whose})"
        for message, whose in messages
        if whose not in ELSEWHERE and message not in MADE_BY_PYTHON and not places(message, whose)
    ]
    assert not lost, "\n".join(lost)


def test_a_message_that_was_reworded_would_show():
    message = "output … already holds a run; continue it with --resume, or choose another output"
    assert message in dict(quoted())
    assert places(message, "flashbone") == ["train/folder.py"]
    assert not places(message.replace("continue", "go on with"), "flashbone")


def test_no_message_is_there_twice_and_each_says_enough_to_be_found():
    messages = [message for message, _ in quoted()]
    assert len(set(messages)) == len(messages)
    for message in messages:
        assert max(map(len, constant_parts(message))) >= 7, message


def error_of(function, *arguments, **fields) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the text is what is compared)
        function(*arguments, **fields)
    return " ".join(str(caught.value).split())


def is_quoted(error: str) -> bool:
    """Whether some message of the page is the beginning, or a part, of this error."""
    patterns = [".*".join(map(re.escape, constant_parts(message))) for message, _ in quoted()]
    return any(re.search(pattern, error) for pattern in patterns)


def layer() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(8, 8))


def test_what_a_new_user_meets_first_is_on_the_page(tmp_path, capsys):
    model = peft.get_peft_model(layer(), BoneConfig(r=4, target_modules=["0"]))
    errors = [
        error_of(BoneConfig, init_weights="mini"),
        error_of(BoneConfig, variant="bat"),
        error_of(BoneConfig, variant="bat-row", init_weights="bat"),
        error_of(BoneConfig, r=0),
        error_of(BoneConfig, lora_alpha=8),
        error_of(BoneConfig, bottleneck_size=8, variant="mini"),
        error_of(peft.get_peft_model, layer(), BoneConfig(target_modules=["q_proj"])),
        error_of(peft.get_peft_model, layer(), BoneConfig(target_modules=["attention.output"])),
        error_of(peft.get_peft_model, layer(), BoneConfig(bottleneck_size=64, target_modules=["0"])),
        error_of(model, torch.ones(2, 8), adapter_names=["default"] * 2),
        error_of(model.eval(), torch.ones(2, 8), adapter_names=["default"]),
        error_of(model.to_lora, "default", 2, 0.1),
    ]
    peft.get_peft_model(layer(), BoneConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "small")
    config = BoneConfig(r=4, target_modules=["0"])
    errors.append(error_of(peft.PeftModel.from_pretrained, layer(), tmp_path / "small", config=config))
    errors.append(error_of(torch.ones(1).sum().backward))
    for command in (
        ["convert", str(tmp_path / "small"), str(tmp_path / "out"), "--to", "rwkv-peft"],
        ["convert", str(tmp_path / "small"), str(tmp_path / "out"), "--to", "lora"],
        ["convert", str(tmp_path / "small"), str(tmp_path / "small"), "--to", "peft"],
    ):
        assert main(command) == 1
        errors.append(capsys.readouterr().err.strip())
    assert main(["trian"]) == 2
    errors.append(capsys.readouterr().err.strip())
    assert not [error for error in errors if not is_quoted(error)]


@pytest.mark.slow
def test_without_flashbone_peft_says_what_the_page_says(tmp_path):
    import subprocess

    peft.get_peft_model(layer(), BoneConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "KeyError: 'BONE'"


def test_links_into_pages_meet_a_heading():
    folder = Path(__file__).parents[2] / "docs"
    for name in ("troubleshooting", "choosing", "moving"):
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        for page, anchor in re.findall(r"\]\(([\w.-]*)#([\w-]+)\)", text):
            other = text if not page else (folder / page).read_text(encoding="utf-8")
            headings = {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", other, re.M)
            }
            assert anchor in headings, (name, page, anchor)
