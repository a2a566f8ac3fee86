"""What to type to run a method of a comparison again, and to train it for good."""

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashbone.compare.config import ComparisonConfig
from flashbone.compare.methods import METHODS
from flashbone.compare.progress import MethodProgress
from flashbone.compare.runs import FIXED
from flashbone.files.outputs import write_text


@dataclass(frozen=True)
class Origin:
    """Where a comparison's configuration came from: the file, and the overrides on the command line."""

    config: str
    overrides: tuple[str, ...] = ()

    def command(self, *more: str) -> str:
        """`flashbone compare` with these and more overrides, for a shell; the last value of a field wins."""
        values: dict[str, str] = {}
        words = iter([*self.overrides, *more])
        for word in words:
            name, equals, value = word.partition("=")
            values[name] = value if equals else next(words, "")
        return shlex.join(["flashbone", "compare", self.config, *(f"{name}={value}" for name, value in values.items())])


def commands(
    comparison: ComparisonConfig, methods: Sequence[MethodProgress], origin: Origin
) -> dict[str, dict[str, str]]:
    """What to type for each method that has a learning rate, by labels: the last two fields of `MethodRow`.

    `rerun` repeats its runs in another folder. `train` is `flashbone train` with a recipe that is written here, for the
    Bone family; for others it is a comparison of this method alone with one seed, which leaves its adapter.
    """
    by_label, words = {}, set()
    for method in methods:
        if method.chosen is None or method.size is None:
            continue
        listed = method.listed
        fields = {"method": listed.method, **listed.settings, "learning_rates": [method.chosen]}
        only = f"--methods={json.dumps([fields])}"
        word = re.sub(r"\W+", "-", listed.label).strip("-")
        word += f"-{len(by_label) + 1}" if word in words else ""
        words.add(word)
        rerun = origin.command(only, f"--output={comparison.output}-{word}")
        seed = f"--seeds=[{comparison.seeds[0]}]"
        train = origin.command(only, seed, f"--output={comparison.output}-{word}-alone")
        if METHODS[listed.method].peft_type == "BONE":
            train = shlex.join(["flashbone", "train", str(_write_recipe(comparison, method, word))])
        by_label[listed.label] = {"rerun": rerun, "train": train}
    return by_label


def _write_recipe(comparison: ComparisonConfig, method: MethodProgress, word: str) -> Path:
    """A recipe for `flashbone train` with all that the comparison decided."""
    import yaml

    assert method.size is not None
    data = {k: v for k, v in dataclasses.asdict(comparison.data).items() if k != "test" and v not in (None, {}, "auto")}
    training = {name: value for name, value in comparison.training.items() if name not in FIXED}
    sections = {name: value for name in ("quantization", "rwkv") if (value := getattr(comparison, name))}
    recipe = {
        "model": comparison.model,
        "task": comparison.task,
        "data": data,
        "adapter": {
            "target_modules": comparison.target_modules,
            **METHODS[method.listed.method].identity,
            **method.listed.settings,
            **method.size.settings,
        },
        "training": {**training, "learning_rate": method.chosen},
        **sections,
        "output": f"{comparison.output}-{word}-trained",
        "seed": comparison.seeds[0],
    }
    folder = Path(comparison.output) / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{word}.yaml"
    write_text(file, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    return file
