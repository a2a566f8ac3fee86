"""What to type to run a method of a comparison again, and to train it for good."""

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone.compare.config import Comparison
from flashbone.compare.jobs import FIXED
from flashbone.compare.methods import METHODS
from flashbone.compare.results import Compared
from flashbone.files.outputs import write_text


@dataclass(frozen=True)
class Origin:
    """Where a comparison's configuration came from: the file, and the overrides on the command line."""

    config: str
    overrides: tuple[str, ...] = ()

    def command(self, *more: str) -> str:
        """`flashbone compare` with these and more overrides, for a shell; of a field the last one counts."""
        pairs: dict[str, str] = {}
        words = iter([*self.overrides, *more])
        for word in words:
            name, given, value = word.partition("=")
            pairs[name] = value if given else next(words, "")
        given = [f"{name}={value}" for name, value in pairs.items()]
        return shlex.join(["flashbone", "compare", self.config, *given])


def commands(comparison: Comparison, methods: Sequence[Compared], origin: Origin) -> dict[str, dict[str, Any]]:
    """What to type for each method that has a learning rate, by labels.

    `rerun` does its runs once more, in another folder. `train` is `flashbone train` with a recipe that is written here,
    for the Bone family; for others it is a comparison of this method alone with one seed, which leaves its adapter.
    """
    found, words = {}, set()
    for one in methods:
        if one.chosen is None or one.sized is None:
            continue
        fields = {"method": one.entry.method, **one.entry.settings, "learning_rates": [one.chosen]}
        only = f"--methods={json.dumps([fields])}"
        word = re.sub(r"\W+", "-", one.entry.label).strip("-")
        word += f"-{len(found) + 1}" if word in words else ""
        words.add(word)
        rerun = origin.command(only, f"--output={comparison.output}-{word}")
        seed = f"--seeds=[{comparison.seeds[0]}]"
        train = origin.command(only, seed, f"--output={comparison.output}-{word}-alone")
        if METHODS[one.entry.method].peft_type == "BONE":
            train = shlex.join(["flashbone", "train", str(_write_recipe(comparison, one, word))])
        found[one.entry.label] = {"rerun": rerun, "train": train}
    return found


def _write_recipe(comparison: Comparison, one: Compared, word: str) -> Path:
    """A recipe for `flashbone train` with all that the comparison decided."""
    import yaml

    assert one.sized is not None
    data = {k: v for k, v in dataclasses.asdict(comparison.data).items() if k != "test" and v not in (None, {}, "auto")}
    training = {name: value for name, value in comparison.training.items() if name not in FIXED}
    sections = {name: value for name in ("quantization", "rwkv") if (value := getattr(comparison, name))}
    recipe = {
        "model": comparison.model,
        "task": comparison.task,
        "data": data,
        "adapter": {
            "target_modules": comparison.target_modules,
            **METHODS[one.entry.method].identity,
            **one.entry.settings,
            **one.sized.settings,
        },
        "training": {**training, "learning_rate": one.chosen},
        **sections,
        "output": f"{comparison.output}-{word}-trained",
        "seed": comparison.seeds[0],
    }
    folder = Path(comparison.output) / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{word}.yaml"
    write_text(file, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    return file
