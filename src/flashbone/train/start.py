"""Training that goes on with an adapter that is there already, in whichever format."""

import tempfile
from pathlib import Path
from typing import Any

import peft

from flashbone import conversion
from flashbone.errors import ConfigError
from flashbone.train.recipe import TASK_TYPES, Recipe


def start_from(model: Any, recipe: Recipe) -> Any:
    """The model with the recipe's `init_adapter`, to be trained on.

    Raises:
        ConfigError: the recipe says something about the adapter, too; or it is none of the family, or of no such model.
        FormatError, ShapeError: the adapter cannot be read, or does not fit the model.
    """
    assert recipe.init_adapter is not None
    if recipe.adapter:
        given = ", ".join(f"adapter.{name}" for name in recipe.adapter)
        raise ConfigError(f"init_adapter says what the adapter is; leave {given} out")
    path = Path(recipe.init_adapter).expanduser()
    with tempfile.TemporaryDirectory() as folder:
        place = recipe.init_adapter
        if path.exists():
            place = str(Path(folder) / "adapter")
            conversion.convert(path, place, to="peft")
        return _loaded(model, place, recipe)


def _loaded(model: Any, place: str, recipe: Recipe) -> Any:
    try:
        config = peft.PeftConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"init_adapter {recipe.init_adapter}: no such file or folder, and no adapter of that hub id could be loaded"
            f" ({' '.join(str(error).split())[:200]})"
        ) from None
    if config.peft_type != "BONE":
        raise ConfigError(
            f"init_adapter {recipe.init_adapter}: is a {config.peft_type} adapter; wanted one of the family"
        )
    config.task_type = TASK_TYPES[recipe.task]  # pyright: ignore[reportAttributeAccessIssue]
    config.base_model_name_or_path = model.name_or_path
    return peft.PeftModel.from_pretrained(model, place, config=config, is_trainable=True)
