"""Rewards of answers for task grpo: a recipe's, by their names, and a function that is named on the command line."""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FlashboneError, one_line
from flashbone.files import patterns
from flashbone.train.data.answers import given_answer, is_same, wanted_answer

ON_THE_COMMAND_LINE = "a recipe runs no code; name the function on the command line: --reward file.py:function"

Reward = Callable[..., list[float | None]]


@dataclass
class Rewards:
    """What answers are rewarded for; `training.reward_weights` gives the weights, in this order.

    Raises:
        ConfigError: a value is out of range.
    """

    exact_match: bool = False  # 1 where the answer is the row's, as `flashbone eval --exact_match` compares them
    regex: str | None = None  # 1 where this regular expression is found in the answer
    length: int | None = None  # 1 up to so many tokens, less for more, 0 from twice as many on

    def __post_init__(self) -> None:
        if self.regex is not None and (why := patterns.problem(_searched(self.regex))):
            raise ConfigError(f"rewards.regex: {self.regex!r} is {why}")
        if self.length is not None and self.length < 1:
            raise ConfigError(f"rewards.length: got {self.length}, wanted a number of tokens")

    def functions(self) -> list[Reward]:
        """As TRL calls them."""

        def exact_match(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
            wanted = map(wanted_answer, answer)
            pairs = zip(map(_text, completions), wanted, strict=True)
            return [float(is_same(given_answer(text, right), right)) for text, right in pairs]

        def regex(completions: list[Any], **_: Any) -> list[float | None]:
            assert self.regex is not None
            return [float(patterns.fullmatch(_searched(self.regex), _text(answer))) for answer in completions]

        def length(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            assert self.length is not None
            return [min(1.0, max(0.0, 2 - len(ids) / self.length)) for ids in completion_ids]

        named = {"exact_match": exact_match, "regex": regex, "length": length}
        return [function for name, function in named.items() if getattr(self, name)]


def _searched(regex: str) -> str:
    return rf"[\s\S]*(?:{regex})[\s\S]*"


def _text(completion: Any) -> str:
    """An answer, which TRL gives as a text or as a list of one turn."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def load_reward(named: str) -> Reward:
    """The function that `file.py:function` names; the file is run.

    Raises:
        ConfigError: there is none.
    """
    place, _, name = named.rpartition(":")
    path = Path(place).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"--reward {named}: no such file; file.py:function was wanted")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--reward {named}: {type(error).__name__}: {one_line(error, 200)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"--reward {named}: {path} has no function {name}")
    return _checked(function, named, path)


def _checked(function: Callable[..., Any], named: str, path: Path) -> Reward:
    def reward(prompts: list[Any], **kwargs: Any) -> list[float | None]:
        try:
            given = list(function(prompts=prompts, **kwargs))
        except Exception as error:
            raise FlashboneError(f"--reward {named}: {type(error).__name__}: {one_line(error, 200)}") from error
        if len(given) != len(prompts) or not all(isinstance(value, int | float | None) for value in given):
            raise FlashboneError(f"--reward {named}: wanted a list of {len(prompts)} numbers, one for each answer")
        return given

    reward.__name__ = getattr(function, "__name__", "reward")
    reward.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()  # pyright: ignore[reportFunctionMemberAccess]
    return reward
