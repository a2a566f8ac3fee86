"""The tokenizer that goes with a model or an adapter: its padding, chat template and end tokens, and texts as ids."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FormatError
from flashbone.files.beside import TEMPLATE, TOKENIZER_CONFIG, beside_model
from flashbone.train.data.origins import named
from flashbone.train.data.tokens import text_ids
from flashbone.train.models import load, locate, trust_of
from flashbone.train.recipe import Recipe, is_pth
from flashbone.train.templates import check_template, give_template, rendered

log = logging.getLogger(__name__)


def load_tokenizer(name: str, vocabulary: str | None = None, adapters: Sequence[Path] = (), **kwargs: Any) -> Any:
    """The tokenizer of a model, with a padding token.

    Args:
        name: The model: a folder, hub id, .gguf file, or an RWKV model's .pth file.
        vocabulary: A file of the tokens of an RWKV model; that of the package rwkv if None.
        adapters: Folders whose own tokenizer goes first, since training may have given it a chat template.
        kwargs: For transformers.

    Raises:
        ConfigError: there is no such model, or it has no tokenizer.
        FormatError: the adapter's tokenizer cannot be read.
    """
    brought = beside_model(name, adapters).files
    if vocabulary is None and TOKENIZER_CONFIG in brought:
        return _with_padding(_of_adapter(name, brought[TOKENIZER_CONFIG].parent), name)
    if is_pth(name):
        from flashbone.rwkv import RwkvTokenizer

        tokenizer = RwkvTokenizer(vocabulary and Path(vocabulary).expanduser())
    else:
        from transformers import AutoTokenizer

        place, gguf = locate(name)
        tokenizer = _with_padding(load(AutoTokenizer, name, place, **gguf, **kwargs), name)
    if TEMPLATE in brought:
        give_template(tokenizer, brought[TEMPLATE])
    return tokenizer


def _of_adapter(name: str, adapter: Path) -> Any:
    if is_pth(name):
        from flashbone.rwkv import RwkvTokenizer as Tokenizer
    else:
        from transformers import AutoTokenizer as Tokenizer
    try:
        return Tokenizer.from_pretrained(adapter)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises no other kind
        raise FormatError(f"{adapter}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from error


def _with_padding(tokenizer: Any, name: str) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"model {name}: its tokenizer has no padding, end or unknown token; add one and save it")
    check_template(tokenizer, f"model {name}")
    return tokenizer


def training_tokenizer(
    recipe: Recipe, args: Any, vocabulary: str | None, conversational: bool, ends: bool = True
) -> Any:
    """The tokenizer to train with: that of the model, with the chat template of `training.chat_template_path`.

    Args:
        recipe: The recipe.
        args: The trainer's; the template is taken out of them, since TRL also takes another model's name there, which
            adds tokens that an adapter of ours would not save.
        vocabulary: As for `load_tokenizer`.
        conversational: Whether the rows need a chat template.
        ends: Whether answers have to end in a token, so that they are learned to stop.

    Raises:
        ConfigError: the template is not a file, or a token or template is missing.
    """
    tokenizer = load_tokenizer(recipe.model, vocabulary, **trust_of(args))
    if args.chat_template_path:
        file = Path(args.chat_template_path)
        if file.suffix not in (".jinja", ".j2") or not file.is_file():
            raise ConfigError(f"training.chat_template_path {file}: no such file; a .jinja or .j2 file was wanted")
        give_template(tokenizer, file)
        args.chat_template_path = None
    if conversational and tokenizer.chat_template is None:
        raise ConfigError(
            f"{named(recipe.data)} holds conversations, but the tokenizer of {recipe.model} has no chat template; "
            "give one with training.chat_template_path: template.jinja, or use prompt and completion columns"
        )
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"training.eos_token {args.eos_token!r}: the tokenizer of {recipe.model} has no such token"
            )
        tokenizer.eos_token = args.eos_token
    if tokenizer.eos_token is None and ends:
        raise ConfigError(
            f"the tokenizer of {recipe.model} has no end-of-text token, so answers could not be learned to stop; "
            "name one of its tokens in training.eos_token"
        )
    return tokenizer


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """The tokens of a text, or of a conversation in the chat template, which ends where the answer begins.

    Raises:
        ConfigError: a conversation, and the tokenizer has no chat template.
        FormatError: the template refuses it.
    """
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise ConfigError("a prompt is a conversation, but the tokenizer has no chat template; give it as text")
    text = rendered(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the model's generation settings and by the tokenizer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    of_tokenizer = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*ends, *of_tokenizer]))


def stop_at(model: Any, tokenizer: Any, learned: Iterable[int]) -> bool:
    """Make generation stop where learned answers end, too; returns whether it did not.

    Args:
        model: Its `generation_config` is changed.
        tokenizer: The model's.
        learned: The tokens that end answers.
    """
    ends = stop_tokens(model, None)
    if not (new := [token for token in dict.fromkeys(learned) if token not in ends]):
        return False
    model.generation_config.eos_token_id = [*ends, *new]
    names = [" and ".join(map(str, tokenizer.convert_ids_to_tokens(ids))) or "nothing" for ids in (new, ends)]
    log.info("model: answers end in %s, but generation stops at %s; the adapter's generation_config has both", *names)
    return True
