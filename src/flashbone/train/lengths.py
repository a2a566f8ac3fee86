"""How many tokens of a row a model reads, within the limits of the model and its tokenizer."""

from typing import Any

from flashbone.errors import ConfigError
from flashbone.train.models import load_config, locate, trust_of
from flashbone.train.recipe import Recipe, is_pth

CLASSIFIED = 512  # tokens of a text that a classifier reads, unless training.max_length sets another number
# Models whose positions begin after the padding token's, so that their table holds that many fewer.
_AFTER_PADDING = ("camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta")
_NO_LIMIT = 10**9  # tokenizers without a limit have 10^30


def limit_length(recipe: Recipe, args: Any) -> None:
    """Set `args.max_length` to what the recipe asks for, or to the default, within what the model takes.

    Raises:
        ConfigError: the recipe asks for more, or there is no such model.
    """
    asked, is_set = recipe.training.get("max_length"), "max_length" in recipe.training
    default = CLASSIFIED if recipe.task == "classification" else getattr(args, "max_length", None)
    if is_set and asked is None:
        if getattr(args, "padding_free", False):  # TRL refuses a length there
            return
        default = None
    config, read = None, None
    if not is_pth(recipe.model):
        init = recipe.training.get("model_init_kwargs") or {}
        positions = {key: init[key] for key in ("revision", "max_position_embeddings") if key in init}
        config, read = load_config(recipe.model, **trust_of(args), **positions), _recorded(recipe.model)
    args.max_length = fitting_length(asked, default, config, read, "training.max_length")


def fitting_length(
    asked: int | None, default: int | None, config: Any, of_tokenizer: int | None, field: str
) -> int | None:
    """The length that the user set, or the default, within the limits of the model and its tokenizer.

    Args:
        asked: What the user set.
        default: What is taken otherwise; None for as many as possible.
        config: The model's, or None.
        of_tokenizer: Its `model_max_length`.
        field: The setting's name, for errors.

    Raises:
        ConfigError: the length is beyond a limit, or below 2.
    """
    if asked is not None and (not isinstance(asked, int) or asked < 2):
        raise ConfigError(f"{field} is {asked!r}; wanted at least 2: a token and the next")
    limits = {"the tokenizer's model_max_length is": of_tokenizer, "the model's positions are": _positions(config)}
    known = [(limit, name) for name, limit in limits.items() if limit and limit < _NO_LIMIT]
    most, name = min(known, default=(_NO_LIMIT, ""))
    if asked is not None and asked > most:
        raise ConfigError(f"{field}: got {asked}, but {name} {most}; lower it")
    wanted = default if asked is None else asked
    if wanted is None:
        return most if most < _NO_LIMIT else None
    return min(wanted, most)


def _positions(config: Any) -> int | None:
    """How many tokens the model has positions for; None where it has no table of them."""
    if config is None:
        return None
    config = config.get_text_config()
    relative = (
        hasattr(config, "relative_attention_num_buckets") or getattr(config, "position_biased_input", True) is False
    )
    positions = getattr(config, "max_position_embeddings", None)
    if relative or not isinstance(positions, int) or positions < 1:
        return None
    kind = str(getattr(config, "model_type", ""))
    if kind.removeprefix("xlm-").removesuffix("-xl").removesuffix("-prelayernorm") in _AFTER_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    return positions


def _recorded(name: str) -> int | None:
    """The `model_max_length` in the tokenizer's file."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    place, gguf = locate(name)
    length = None if gguf else get_tokenizer_config(place).get("model_max_length")
    return int(length) if isinstance(length, int | float) else None
