"""`flashbone train CONFIG.yaml --dry-run`: what a run would read, learn and need, before it is started."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from flashbone.errors import FlashboneError

if TYPE_CHECKING:
    from flashbone.train.plan import Plan
    from flashbone.train.recipe import Recipe
    from flashbone.train.rewards import Reward

MEMORY = ("base_bytes", "weight_bytes", "state_bytes", "activation_bytes", "training_bytes")
# Fields of an adapter's configuration that do not decide what it costs, or that a model without weights lacks.
OF_FILES = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


def dry_run(recipe: "Recipe", as_json: bool, reward: "Reward | None" = None) -> None:
    """Print the report on stdout, from the main process: for people, or as one JSON object; nothing is written."""
    from flashbone.train.plan import plan

    made = plan(recipe, reward)
    if os.environ.get("RANK", "0") != "0":
        return
    memory, note = _memory(made)
    if as_json:
        print(json.dumps(_plain(made, memory), indent=2, ensure_ascii=False))
    else:
        from flashbone.train.plan_report import print_plan

        print_plan(made, memory, note)


def _memory(made: "Plan") -> tuple[dict[str, int] | None, str]:
    """The bytes that training takes, as `flashbone inspect` counts them, and a note; or why it does not."""
    from flashbone.inspect.model import inspect_model

    config = made.adapter
    fields = {
        item.name: value
        for item in dataclasses.fields(config)
        if item.init and item.name not in OF_FILES and (value := getattr(config, item.name)) != item.default
    }
    try:
        report = inspect_model(made.model, fields, tokens=made.tokens, dtype=made.dtype)
    except FlashboneError as error:
        return None, str(error)
    note = "; the base is counted as if it were not quantised" if made.is_quantised else ""
    costs = {name: getattr(report.costs, name) for name in MEMORY[1:]}
    return {"base_bytes": report.base_bytes, **costs}, note


def _plain(made: "Plan", memory: dict[str, int] | None) -> dict[str, Any]:
    """What `--json` prints."""
    rows = {name: dataclasses.asdict(source) | {"lengths": source.quantiles()} for name, source in made.rows.items()}
    return {
        "rows": rows,
        "columns": made.columns,
        "examples": [{"text": example.text, "learned": example.learned} for example in made.examples],
        "steps": made.steps,
        "parameters": {**made.parameters, "memory": memory},
    }
