"""Files that cannot be read to their end: pipes, devices, terabytes; and heads that claim what is not there."""

import json
import os

import pytest
import torch

from flashbone.cli import main
from flashbone.errors import FormatError
from flashbone.files import gguf_head, records
from flashbone.files.sources import refuse_special
from flashbone.train.data import parsing, rows
from helpers.adapter_folders import write_adapter
from hostile.originals import write_gguf


def test_pipes_and_devices_are_refused_and_never_opened(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    refuse_special(tmp_path, tmp_path / "a.json", tmp_path / "absent")
    os.mkfifo(tmp_path / "b.safetensors")
    (tmp_path / "c.json").symlink_to("/dev/zero")
    for place in (tmp_path, tmp_path / "b.safetensors", tmp_path / "c.json"):
        with pytest.raises(FormatError, match=r"(b.safetensors|c.json): not a regular file"):
            refuse_special(place)


def test_rows_in_a_pipe_are_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert main(["eval", "absent", "--perplexity", str(tmp_path / "rows.jsonl")]) == 1
    assert "rows.jsonl: not a regular file" in capsys.readouterr().err


def test_a_config_of_a_terabyte_is_refused_unread(tmp_path, capsys):
    folder = write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)})
    os.truncate(folder / "adapter_config.json", 1 << 40)
    assert main(["inspect", str(folder)]) == 1
    assert "adapter_config.json: larger than 256 MiB" in capsys.readouterr().err


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "LONGEST", 1 << 20)
    monkeypatch.setattr(rows, "LONGEST", 1 << 20)
    for name, start in (("rows.jsonl", '{"text": "a"}\n'), ("rows.csv", "text\n")):
        (tmp_path / name).write_text(start)
        os.truncate(tmp_path / name, 1 << 40)
        with pytest.raises(FormatError, match=rf"{name}:2: a line of more than 1 MiB"):
            list(rows.read_rows(tmp_path / name))
    (tmp_path / "rows.csv").write_text('text\n"' + "x\n" * (1 << 20) + '"\n')
    with pytest.raises(FormatError, match=r"rows.csv:2: a cell of more than 1 MiB; is a quote not closed"):
        list(rows.read_rows(tmp_path / "rows.csv"))


def test_very_many_names_are_read_once(tmp_path):
    """Each in the time of a second: to count each name among all of them would take hours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows.csv").write_text(",".join(map(str, range(200_000))) + "\n")
    with pytest.raises(FormatError, match=r"rows.csv: the names of the columns take more than 1 MiB; is it CSV\?"):
        list(rows.read_rows(tmp_path / "rows.csv"))
    names = [*map(str, range(100_000)), "7"]
    (tmp_path / "rows.jsonl").write_text("{" + ", ".join(f'"{name}": 1' for name in names) + "}\n")
    (row,) = rows.read_rows(tmp_path / "rows.jsonl")
    assert "has the key '7' twice" in str(row)
    names = [*map(str, range(20_000)), "7"]
    pq.write_table(pa.table([pa.array([1])] * len(names), names=names), tmp_path / "rows.parquet")
    with pytest.raises(FormatError, match=r"rows.parquet: several columns have the name '7'; rename them"):
        list(rows.read_rows(tmp_path / "rows.parquet"))


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    import pandas as pd

    file = tmp_path / "rows.parquet"
    pd.DataFrame({"text": [json.dumps(n) * 50 for n in range(100)]}).to_parquet(file)
    data = bytearray(file.read_bytes())
    for places in (range(4, 40), range(len(data) - 40, len(data) - 8)):  # a page; what describes the columns
        odd = bytearray(data)
        odd[places.start : places.stop] = b"\xff" * len(places)
        file.write_bytes(odd)
        with pytest.raises(FormatError, match=r"rows.parquet: not a valid parquet file"):
            list(rows.read_rows(file))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"block_count\x04\0\0\0\x01", b"block_count\x04\0\0\0\x7f", "block_count: got 127, but it has 1 blocks"),
        (b"llama.block_count", b"llama.blocK_count", "block_count: got None, but it has 1 blocks"),
        (b"embedding_length\x04\0\0\0\x20\0\0\0", b"embedding_length\x04\0\0\0\x20\0\0\x7f", "embedding_length: got"),
        (b"GGUF", b"GGUX", "is damaged, or no GGUF file"),
        (b"\x14\0\0\0\0\0\0\0general.architecture", b"\xff" * 8 + b"general.architecture", "it claims"),
    ],
)
def test_a_gguf_file_that_claims_what_it_has_not_is_refused(tmp_path, old, new, message):
    file = tmp_path / "base/model.gguf"
    write_gguf(file)
    gguf_head.check(file)
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(FormatError, match=message):
        gguf_head.check(file)


def test_numbers_beyond_floats_and_nan_do_not_fit_a_record():
    for hint in (int, float, int | None):
        assert records.fits(3, hint)
        assert not any(records.fits(number, hint) for number in (10**400, -(10**400), float("inf"), float("nan")))
