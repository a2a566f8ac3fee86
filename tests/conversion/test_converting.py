"""`flashbone convert` between the family's own formats: the command, the page of the docs, files and folders."""

import re
from pathlib import Path

import pytest
import torch

from flashbone import cli, convert
from flashbone.cli.convert import EPILOG
from flashbone.errors import ConfigError, FlashboneError, FormatError
from flashbone.files import peft, reading, rwkv
from flashbone.files.adapter import same_values
from helpers.adapter_folders import listing, write_adapter

PAGE = Path(__file__).parent.parent.parent / "docs" / "converting.md"


@pytest.fixture
def adapter(tmp_path) -> Path:
    blocks = {f"blocks.{i}.att.key": torch.randn(4, 8).bfloat16() for i in range(2)}
    return write_adapter(tmp_path / "my-adapter", "bone", blocks, base_model_name_or_path="org/model")


def test_a_chain_through_every_format_ends_where_it_began(adapter, tmp_path):
    steps = ["miss", "rwkv-peft", "miss", "peft"]
    place = adapter
    for n, step in enumerate(steps):
        report = convert(place, tmp_path / f"{n}", step)
        assert (report.format, report.variant, report.modules, report.exact) == (step, "bone", 2, True)
        place = tmp_path / f"{n}" / "adapter.pth" if step == "rwkv-peft" else tmp_path / f"{n}"
    first, last = peft.read(adapter), peft.read(place)
    assert all(same_values(last.blocks[name], block) for name, block in first.blocks.items())
    assert first.blocks.keys() == last.blocks.keys()


def test_the_help_and_the_page_list_every_format():
    assert re.findall(r"^  ([\w-]+) ", EPILOG, re.M) == list(reading.FORMATS)
    table = PAGE.read_text(encoding="utf-8").split("| FORMAT |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)`", table, re.M) == list(reading.FORMATS)


def test_a_file_is_written_where_out_ends_like_one(adapter, tmp_path):
    report = convert(adapter, tmp_path / "out.pth", "rwkv-peft")
    assert (report.files, (tmp_path / "out.pth").is_file()) == (("out.pth",), True)
    assert len(rwkv.read_adapter(tmp_path / "out.pth").blocks) == 2
    report = convert(adapter, tmp_path / "out", "rwkv-peft")
    assert report.files == ("README.md", "adapter.pth")


def test_the_command_converts_and_says_so_in_a_line(adapter, tmp_path, capsys):
    assert cli.main(["convert", str(adapter), str(tmp_path / "out"), "--to", "miss"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{tmp_path / 'out'}: 2 modules, bone to miss, exact\n", "")
    assert listing(tmp_path / "out") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_refusal_is_a_line_and_leaves_nothing(adapter, tmp_path, capsys):
    write_adapter(tmp_path / "row", "bat-row", {"q": torch.ones(2, 4, 4)})
    before = listing(tmp_path)
    assert cli.main(["convert", str(tmp_path / "row"), str(tmp_path / "deep" / "out"), "--to", "miss"]) == 1
    assert re.fullmatch(r"flashbone convert: error: this bat-row adapter .*\n", capsys.readouterr().err)
    assert listing(tmp_path) == before


def test_bad_arguments_are_refused(adapter, tmp_path):
    with pytest.raises(ConfigError, match="to: got 'misss', wanted one of peft, miss, lora, rwkv-peft, gguf"):
        convert(adapter, tmp_path / "out", "misss")
    with pytest.raises(ConfigError, match="rank and error are for LoRAs"):
        convert(adapter, tmp_path / "out", "miss", rank=4)
    with pytest.raises(FlashboneError, match=r"must not be .* or lie inside it"):
        convert(adapter, adapter / "inside", "miss")
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(FormatError, match="this is a IA3 adapter, wanted BONE, MISS, LORA"):
        convert(adapter, tmp_path / "out", "miss")
    assert not (tmp_path / "out").exists()


def test_the_first_python_of_the_page_reports_what_was_converted(adapter, monkeypatch, capsys):
    monkeypatch.chdir(adapter.parent)
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    exec(compile(block, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "bone 2 0 True\n"
