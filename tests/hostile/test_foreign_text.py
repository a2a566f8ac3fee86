"""What files say can neither steer a terminal, nor end our part of a card, nor pass for a killed run's work."""

import torch

from flashbone.cli import main
from flashbone.files import cards, outputs
from flashbone.train.folder import RunFolder
from helpers.adapter_folders import write_adapter

HOSTILE = "b\x1b[2Jase\u202e\nflashbone inspect: all is well"


def test_escapes_of_a_config_do_not_reach_the_terminal(tmp_path, capsys):
    folder = write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)}, base_model_name_or_path=HOSTILE)
    for command in (["inspect", str(folder)], ["inspect", str(folder), "--json"]):
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert all(letter.isprintable() or letter == "\n" for letter in printed)
        assert "\nflashbone inspect: all is well" not in printed


def test_a_base_cannot_end_our_part_of_a_card(tmp_path):
    name = f"evil {cards.END} <!-- x --> `a` | b\x1b[1m"
    write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)}, base_model_name_or_path=name)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "miss"]) == 0
    text = (tmp_path / "b/README.md").read_text()
    body = text.split("---\n", 2)[2]
    assert (body.count(cards.BEGIN), body.count(cards.END)) == (1, 1)
    assert "\x1b" not in body


def test_convert_names_what_a_killed_run_left(tmp_path, capsys):
    write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)})
    (tmp_path / ".b.x.partial").mkdir()
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "miss"]) == 0
    assert ".b.x.partial is left of a run that was killed" in capsys.readouterr().err


def test_a_run_that_cleans_up_keeps_its_own_lock(tmp_path):
    with outputs.alone(tmp_path / "run"):
        (tmp_path / "run/merged.partial").mkdir()
        RunFolder(tmp_path / "run").remove_partial()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [outputs.LOCK]
