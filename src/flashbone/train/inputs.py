"""Hashes of what a run reads: a resumed run has to read the same to reach the same losses."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError
from flashbone.train.recipe import Recipe

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pth")
WHOLE, PIECES, PIECE = 2**26, 256, 2**16  # larger files are read in pieces from end to end, 16 MiB of each
STREAMED = 1000  # examples of a stream that are read


@dataclass(frozen=True)
class Inputs:
    """Hashes of what is read, and how many rows make a step.

    Attributes:
        rows: of the training examples, in their order.
        held_out: of the held-out examples.
        tokenizer: of its vocabulary, its rules, its special tokens and its chat template.
        base: of the model's configuration and weights.
        adapter: of the adapter that it goes on with, if it does.
        reward: of the file with the function that rewards answers, if there is one.
        processes: that train together.
        batch: rows of each process at a time.
        accumulated: such batches make a step.
    """

    rows: str
    held_out: str | None
    tokenizer: str
    base: str
    processes: int
    batch: int
    accumulated: int
    adapter: str | None = None
    reward: str | None = None

    @property
    def rows_per_step(self) -> int:
        """The rows of a step, of all processes."""
        return self.processes * self.batch * self.accumulated


def inputs_of(recipe: Recipe, trainer: Any, data: Any) -> Inputs:
    """What this run reads."""
    args = trainer.args
    return Inputs(
        rows=_rows(data.train),
        held_out=None if data.eval is None else _rows(data.eval),
        tokenizer=_tokenizer(trainer.processing_class),
        base=_hash(_base_files(recipe)),
        adapter=None if recipe.init_adapter is None else _hash(_adapter_files(recipe.init_adapter)),
        reward=getattr(trainer, "reward_sha256", None),
        processes=args.world_size,
        batch=args.train_batch_size,
        accumulated=args.gradient_accumulation_steps,
    )


def check_same(before: Inputs, now: Inputs, output: Path, with_batch: bool = True) -> None:
    """Raise ConfigError that names what changed since the run began; the batch may change while no step is kept."""
    names = {
        "rows": "the training rows (their order or content)",
        "held_out": "the held-out rows",
        "tokenizer": "the tokenizer (vocabulary, special tokens or chat template)",
        "base": "the model's files",
        "adapter": "the files of init_adapter",
        "reward": "the file of --reward",
    }
    changed = [words for name, words in names.items() if getattr(before, name) != getattr(now, name)]
    if changed:
        raise ConfigError(
            f"output {output}: changed since its run began: {'; '.join(changed)}; resume with what it began with, or"
            " choose another output"
        )
    if with_batch and before.rows_per_step != now.rows_per_step:
        raise ConfigError(
            f"output {output}: its run began with {_batches(before)}, and this is {_batches(now)};"
            f" {_remedy(before, now)}, or choose another output"
        )


def _batches(inputs: Inputs) -> str:
    """The rows of a step in words."""
    plural = "es" if inputs.processes > 1 else ""
    return (
        f"{inputs.rows_per_step} rows a step ({inputs.processes} process{plural}, per_device_train_batch_size"
        f" {inputs.batch}, gradient_accumulation_steps {inputs.accumulated})"
    )


def _remedy(before: Inputs, now: Inputs) -> str:
    """The numbers that give the old order."""
    total, batch = before.rows_per_step, now.batch
    if total % now.processes:
        return f"{before.processes} processes give the same order"
    of_each = total // now.processes
    if of_each % batch:
        batch = before.batch if of_each % before.batch == 0 else of_each
    return (
        f"training.per_device_train_batch_size {batch} and training.gradient_accumulation_steps {of_each // batch} give"
        " the same order"
    )


def _rows(dataset: Any) -> str:
    digest = hashlib.sha256()
    if not hasattr(dataset, "__len__"):  # a stream
        for row in itertools.islice(dataset, STREAMED):
            digest.update(_plain(row))
        return digest.hexdigest()
    for table in dataset.with_format("arrow").iter(1000):
        for name in sorted(table.column_names):
            digest.update(name.encode())
            for part in _parts(table.column(name).combine_chunks()):
                digest.update(part)
    return digest.hexdigest()


def _parts(column: Any) -> Iterator[bytes]:
    """The bytes of an arrow array. Lists of integers, maybe billions, are not turned into Python objects."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_list(kind) and pyarrow.types.is_integer(kind.value_type) and not column.null_count:
        yield column.value_lengths().to_numpy(zero_copy_only=False).tobytes()
        yield column.flatten().cast("int64").to_numpy(zero_copy_only=False).tobytes()
    else:
        yield _plain(column.to_pylist())


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass")


def _tokenizer(tokenizer: Any) -> str:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}  # set by each call
    parts = (
        type(tokenizer).__name__,
        rules or sorted((str(token), number) for token, number in tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    )
    return hashlib.sha256(_plain(parts)).hexdigest()


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            if size <= WHOLE:
                digest.update(content.read())
                continue
            for number in range(PIECES):
                content.seek(number * (size - PIECE) // (PIECES - 1))
                digest.update(content.read(PIECE))
    return digest.hexdigest()


def _base_files(recipe: Recipe) -> list[Path]:
    from transformers.utils.hub import cached_file

    path = Path(recipe.model).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        revision = (recipe.training.get("model_init_kwargs") or {}).get("revision")
        path = Path(cached_file(recipe.model, "config.json", revision=revision) or "").parent
    return sorted(file for file in path.iterdir() if file.suffix in WEIGHTS or file.name == "config.json")


def _adapter_files(adapter: str) -> list[Path]:
    from transformers.utils.hub import cached_file

    path = Path(adapter).expanduser()
    if not path.exists():
        path = Path(cached_file(adapter, "adapter_config.json") or "").parent
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
