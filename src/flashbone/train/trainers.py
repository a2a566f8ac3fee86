"""Which trainer a model gets: TRL's, or RWKV's on top of it; and what goes with which."""

import functools
from collections.abc import Callable
from typing import Any

from flashbone.errors import ConfigError
from flashbone.train.models import is_pth
from flashbone.train.recipe import Recipe
from flashbone.train.sections import RwkvSettings


def sft_trainer_class(
    model: Any, settings: RwkvSettings | None, args: Any, name: str
) -> tuple[Callable[..., Any], dict[str, list[str]]]:
    """The trainer for a language model, and what is trained along, as fields of BoneConfig.

    Raises:
        ConfigError: settings of RWKV for another model, or ones that do not fit this one.
    """
    if not str(getattr(model.config, "model_type", "")).startswith("rwkv_x0"):
        if settings is not None:
            raise ConfigError(f"rwkv: {name} is a {type(model).__name__}, no RWKV-6 or RWKV-7; leave the section out")
        from trl.trainer.sft_trainer import SFTTrainer

        return SFTTrainer, {}
    from flashbone.train import rwkv

    settings = settings or RwkvSettings()
    if settings.vocabulary is not None and not is_pth(name):
        raise ConfigError(f"rwkv.vocabulary: {name} is a folder, which has its own tokenizer; leave it out")
    return functools.partial(rwkv.RwkvTrainer, settings=settings), rwkv.prepare(model, settings, args)


def refuse_classification(recipe: Recipe) -> None:
    """Raise ConfigError where a recipe for classification says what only language models have."""
    if recipe.task != "classification":
        return
    given = {"init_adapter": recipe.init_adapter is not None, "rwkv": recipe.rwkv, "model": is_pth(recipe.model)}
    if named := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"{', '.join(named)}: RWKV models and init_adapter are for task sft, not classification")
