"""`flashbone train` without the packages of its extra."""

import importlib.util

from flashbone.cli import main


def test_missing_packages_of_the_extra_are_named_in_one_line(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("trl", "datasets") else found(name))
    assert main(["train", "any.yaml"]) == 1
    assert capsys.readouterr().err == (
        "flashbone train: error: training needs trl, datasets, not installed; run: pip install 'flashbone[train]'\n"
    )
