"""What files say can neither steer a terminal, nor end our part of a card, nor pass for a killed run's work."""

import re

import torch
from rich.text import Text

from compare.report.comparison_rows import header, method, write
from flashbone.cli import main
from flashbone.compare.report import print_comparison
from flashbone.files import cards, outputs
from flashbone.printing import Console, Table
from flashbone.train.folder import RunFolder
from flashbone.train.plan import Plan, Shown, SourceRows
from flashbone.train.plan_report import print_plan
from helpers.adapter_folders import write_adapter

HOSTILE = "b\x1b[2Jase\u202e\nflashbone inspect: all is well"


def test_escapes_of_a_config_do_not_reach_the_terminal(tmp_path, capsys):
    folder = write_adapter(tmp_path / "a", "bone", {"q": torch.ones(4, 8)}, base_model_name_or_path=HOSTILE)
    for command in (["inspect", str(folder)], ["inspect", str(folder), "--json"]):
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert all(letter.isprintable() or letter == "\n" for letter in printed)
        assert "\nflashbone inspect: all is well" not in printed


def test_escapes_in_tables_and_lines_do_not_reach_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="bold"))
    table.add_row("x" * 5000)
    for what in (table, HOSTILE, Text(HOSTILE)):
        Console().print(what)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # rich's own colours
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    assert "[2J" in printed
    assert printed.count("x") < 300


def plan_of(name: str) -> Plan:
    rows = SourceRows(format=name, read=1, kept=1, dropped={name: 1}, cut=0, held_out=0, learned=1, lengths={1: 1})
    parameters = {"trainable_parameters": 1, "total_parameters": 2, "trainable_percent": 50.0}
    shown = Shown(name, [name], [(name, True)])
    return Plan(
        {name: rows}, {"used": [name], "unused": []}, [shown], 1, parameters, None, False, None, 1, torch.float32
    )


def test_escapes_of_a_dry_run_and_a_comparison_do_not_reach_the_terminal(tmp_path, capsys):
    print_plan(plan_of(HOSTILE), None, HOSTILE)
    lines = [header(name=HOSTILE, model=HOSTILE), method("bone", HOSTILE, size=HOSTILE), method("lora", error=HOSTILE)]
    print_comparison(write(tmp_path, lines))
    printed = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    assert "[2J" in printed


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
