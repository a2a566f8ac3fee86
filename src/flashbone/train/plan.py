"""What a run would do, without its weights: rows read, cut and dropped, what is learned of them, steps, parameters."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flashbone.errors import ConfigError
from flashbone.train.arguments import check_launch, trainer_arguments
from flashbone.train.classify import untruncated
from flashbone.train.data.counts import RowCounts
from flashbone.train.data.images import has_images
from flashbone.train.data.loading import Data, Read, load_data
from flashbone.train.data.prepared import prepare
from flashbone.train.data.tokens import IGNORED, Tokens, pieces
from flashbone.train.data.windows import count, windows_for, without_numbers
from flashbone.train.fitting import total_steps
from flashbone.train.lengths import limit_length
from flashbone.train.recipe import Recipe, check_task
from flashbone.train.rewards import Reward
from flashbone.train.trainers import build_trainer, limits_of

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 3  # examples
NOTHING_LEFT = "nothing left to learn within training.max_length"
TOO_SHORT = "fewer than two tokens"


@dataclass(frozen=True)
class SourceRows:
    """What becomes of the rows of one source.

    Attributes:
        format: of the rows.
        read: how many there are.
        kept: how many are learned or held out.
        dropped: how many are not, by reason.
        cut: rows as the model sees them that are longer than training.max_length.
        held_out: of those read, for evaluation.
        learned: in an epoch, with the source's weight, before any is dropped for its length.
        lengths: tokens -> rows as the model sees them that have so many, as cut.
    """

    format: str
    read: int
    kept: int
    dropped: dict[str, int]
    cut: int
    held_out: int
    learned: int
    lengths: dict[int, int]

    def quantiles(self) -> dict[str, int]:
        """The shortest, the median and the longest length; nothing where no row is left."""
        tokens = list(Counter(self.lengths).elements())
        at = {"shortest": 0, "median": len(tokens) // 2, "longest": len(tokens) - 1}
        return {name: tokens[number] for name, number in at.items()} if tokens else {}


@dataclass(frozen=True)
class Shown:
    """An example with the pieces of its text that are learned, or its class."""

    text: str
    learned: list[str]
    pieces: list[tuple[str, bool]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        rows: by source.
        columns: `used` and `unused` ones, of all sources.
        examples: the first of each source, up to three.
        steps: optimiser steps, in all epochs.
        parameters: `trainable_parameters`, `total_parameters`, `trainable_percent`, as in summary.json.
        model: transformers' configuration.
        is_quantised: whether the run has the model in few bits.
        adapter: PEFT's configuration.
        tokens: of the longest batch: rows times the longest row.
        dtype: of the base.
    """

    rows: dict[str, SourceRows]
    columns: dict[str, list[str]]
    examples: list[Shown]
    steps: int
    parameters: dict[str, Any]
    model: Any
    is_quantised: bool
    adapter: Any
    tokens: int
    dtype: Any


def plan(recipe: Recipe, reward: Reward | None = None) -> Plan:
    """What `train` would do with this recipe: its own trainer is built, on a model without weights.

    Raises:
        FlashboneError: as `train` would.
    """
    check_task(recipe)
    if recipe.data.streaming:
        raise ConfigError("data.streaming: a dry run reads all rows; set it to false, with a part of the rows")
    with tempfile.TemporaryDirectory() as folder:  # transformers makes the output folder
        recipe = replace(recipe, output=folder)
        args = trainer_arguments(recipe)
        check_launch(recipe, args)
        limit_length(recipe, args)
        data = load_data(recipe, windows_for(args))
        if has_images(data.train):
            raise ConfigError("--dry-run: images are only read by a run itself; start one with training.max_steps: 1")
        trainer, _ = build_trainer(recipe, _unplaced(args), data, has_weights=False, reward=reward)
        steps = total_steps(trainer)
    numbers = [(source.held_out, source.learned) for source in data.sources]
    numbers += [(len(place.examples), 0) for place in data.read[len(numbers) :]]
    seen = [_seen(place, *of, data, trainer, args) for place, of in zip(data.read, numbers, strict=True)]
    rows = {name: source for name, (source, _) in zip(_names(data.read), seen, strict=True)}
    trainable, total = trainer.model.get_nb_trainable_parameters()
    longest = max(max(source.lengths, default=1) for source in rows.values())
    return Plan(
        rows=rows,
        columns=_columns([place.counts for place in data.read]),
        examples=list(itertools.islice(_in_turns([shown for _, shown in seen[: len(data.sources)]]), SHOWN)),
        steps=steps,
        parameters={
            "trainable_parameters": trainable,
            "total_parameters": total,
            "trainable_percent": round(100 * trainable / total, 4),
        },
        model=trainer.model.config,
        is_quantised=bool(recipe.quantization or getattr(trainer.model.config, "quantization_config", None)),
        adapter=next(iter(trainer.model.peft_config.values())),
        tokens=args.train_batch_size * longest,
        dtype=next(p.dtype for p in trainer.model.parameters() if not p.requires_grad),
    )


def _columns(counts: list[RowCounts]) -> dict[str, list[str]]:
    """The columns of all sources, without repeats."""
    kinds = {"used": [rows.used for rows in counts], "unused": [rows.unused for rows in counts]}
    return {kind: list(dict.fromkeys(itertools.chain(*names))) for kind, names in kinds.items()}


def _unplaced(args: Any) -> Any:
    """The arguments, changed to leave the model on the meta device."""
    args.__class__ = type(type(args).__name__, (type(args),), {"place_model_on_device": False})
    return args


def _names(read: list[Read]) -> list[str]:
    """A name for each place of rows: its path, numbered where several share it."""
    times = Counter(place.path for place in read)
    return [place.path if times[place.path] == 1 else f"{place.path} ({n})" for n, place in enumerate(read, 1)]


def _seen(
    place: Read, held_out: int, learned: int, data: Data, trainer: Any, args: Any
) -> tuple[SourceRows, list[Shown]]:
    """What becomes of the rows of one place, and its first examples."""
    rows, dropped = without_numbers(place.examples), dict(place.counts.dropped)
    tokenizer = trainer.processing_class
    if data.labels:
        lengths = untruncated(rows, tokenizer)
        cut, empty = sum(length > args.max_length for length in lengths), 0
        lengths = [min(length, args.max_length) for length in lengths]
        first: Any = rows.select(range(min(SHOWN, len(rows))))
        texts = [[text for text in (row["text"], row.get("text_pair")) if text] for row in first]
        examples = [Shown("\n\n".join(of), [row["label"]]) for of, row in zip(texts, first, strict=True)]
    else:
        made, counts = prepare(
            rows, tokenizer, limits_of(args, trainer.model, tokenizer), getattr(args, "dataset_num_proc", None)
        )
        cut, empty = counts.cut, counts.dropped
        lengths = [len(ids) for ids in made["input_ids"]]
        examples = [_shown(made, number, tokenizer) for number in range(min(SHOWN, len(made)))]
    short = place.counts.kept - count(place.examples) if place.is_whole else 0
    dropped |= {reason: n for reason, n in ((NOTHING_LEFT, empty), (TOO_SHORT, short)) if n}
    read = place.counts.read if place.is_whole else count(place.examples)
    kept = read - sum(dropped.values())
    return SourceRows(
        place.format, read, kept, dropped, cut, held_out, learned, dict(sorted(Counter(lengths).items()))
    ), examples


def _shown(made: "Dataset", number: int, tokenizer: Any) -> Shown:
    row = made[number]
    ids = list(row["input_ids"])
    labels = row.get("labels", ids)
    shown = pieces(Tokens(ids, [label != IGNORED for label in labels], []), tokenizer)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return Shown(text, [piece for piece, is_learned in shown if is_learned], shown)


def _in_turns(parts: list[list[Shown]]) -> Iterator[Shown]:
    """The first of each part, then the second of each, and so on."""
    for row in itertools.zip_longest(*parts):
        yield from (example for example in row if example is not None)
