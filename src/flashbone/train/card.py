"""What the card of a run's adapter says of the run: its data, its figures and its recipe."""

import dataclasses
from pathlib import Path

from flashbone.files import cards
from flashbone.train.recipe import Recipe, recipe_text
from flashbone.train.summary import Summary

HELD_OUT = {"held-out loss": "eval_loss", "held-out accuracy": "eval_accuracy", "held-out macro-F1": "eval_macro_f1"}


def add_run(file: Path, recipe: Recipe, summary: Summary) -> None:
    """Add the run to the card beside its adapter; a recipe may hold a token, which stays out."""
    training = {name: value for name, value in recipe.training.items() if not name.endswith("token")}
    cards.put_run(file, facts(summary), recipe_text(dataclasses.replace(recipe, training=training)))


def facts(summary: Summary) -> dict[str, str]:
    """The run in a few lines."""
    data = "; ".join(f"{source.path}, {source.rows:,} rows" for source in summary.sources)
    trained = f"{summary.trainable_parameters:,} of {summary.total_parameters:,}"
    found = {
        "data": data or "not recorded",
        "steps": f"{summary.steps:,}, {summary.epochs:g} epochs, {summary.tokens:,} tokens",
        "trained parameters": f"{trained} ({summary.trainable_percent:.2f} %)",
    }
    for name, field in HELD_OUT.items():
        before, after = (getattr(summary, f"{field}_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            found[name] = f"{before:.4f} before, {after:.4f} after"
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return found | {"made with": f"{versions}; {summary.device}"}
