"""`~` and `$NAME` in the places that commands are given."""

from pathlib import Path

import pytest

from flashbone.cli import main
from helpers.adapter_folders import blocks_for, tiny_llama, write_adapter

WORDS = {
    "merge": ["{}/base", "{}/adapter", "{}/out"],
    "convert": ["{}/adapter", "{}/out", "--to", "miss"],
    "eval": ["{}/base", "--adapter", "{}/adapter", "--perplexity", "{}/rows.jsonl"],
    "inspect": ["{}/base", "--config", "{}/c.yaml"],
    "train": ["{}/c.yaml"],
    "compare": ["{}/c.yaml", "--plan"],
}


@pytest.mark.parametrize("command", WORDS)
def test_a_variable_that_is_not_set_is_one_line_in_every_command(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([command, *(word.format("$NO_SUCH_VARIABLE") for word in WORDS[command])]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "the variable NO_SUCH_VARIABLE is not set; set it, or write the path out" in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("home", ["~", "$PLACE", "${PLACE}"])
def test_places_are_filled_in(home, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "adapter", "bone", blocks_for(tiny_llama(), "bone", ("q_proj",), 4))
    assert main(["convert", f"{home}/adapter", f"{home}/out", "--to", "miss"]) == 0
    assert (tmp_path / "out").exists()
    assert not Path(home).exists()
