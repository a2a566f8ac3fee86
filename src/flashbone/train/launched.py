"""What accelerate's launcher decides for a run, by environment variables, and what it then cannot do."""

import os
from typing import Any

from flashbone.errors import ConfigError
from flashbone.train.recipe import Recipe


def check_launch(recipe: Recipe, args: Any) -> None:
    """Refuse what the engine cannot do that the configuration chose, or accelerate's launcher by the environment.

    Raises:
        ConfigError: a merge of a model in pieces, or accumulation that is not what the launcher told DeepSpeed.
    """
    zero = bool(args.deepspeed) or _is_set("ACCELERATE_USE_DEEPSPEED")
    if recipe.merge and (args.fsdp or zero or _is_set("ACCELERATE_USE_FSDP")):
        raise ConfigError("merge: true needs the whole model in one process; train without it, then `flashbone merge`")
    steps, wanted = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ""), args.gradient_accumulation_steps
    if zero and not args.deepspeed and steps.isdecimal() and int(steps) != wanted:
        raise ConfigError(
            f"training.gradient_accumulation_steps: got {wanted}, but accelerate's file says {steps} to DeepSpeed; give"
            " both the same number"
        )


def _is_set(flag: str) -> bool:
    return os.environ.get(flag, "").lower() in ("1", "true")
