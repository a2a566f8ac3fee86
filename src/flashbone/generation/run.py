"""One `flashbone generate`: rows are read and checked, the model is loaded once, answers come batch by batch."""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashbone.errors import ConfigError
from flashbone.evaluate import answer_file
from flashbone.files import outputs
from flashbone.generation.rows import GENERATED, TOKENS, Asked, read_asked
from flashbone.generation.speaker import Model, load_speaker
from flashbone.train.decoding import Decoding, batches, check_lengths
from flashbone.train.summary import versions

log = logging.getLogger(__name__)

PROMPT = "--prompt"  # the place of the row that a command line gives
Row = dict[str, Any]
Bars = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        row: its number in the rows that were given, from 0.
        text: what the model wrote, without the token that ended it.
        tokens: how many were generated, the one that ended the text included.
    """

    row: int
    text: str
    tokens: int


@dataclass(frozen=True)
class Prompts:
    """What is to be generated.

    Attributes:
        model: what answers.
        file: rows of prompts; or
        prompt: a single one.
        output: a .jsonl file for the rows with their answers.
        decoding: how tokens are chosen.
        system: a system prompt for rows without one.
        use_template: make texts the user's turn, where the model has a chat template.
        columns: our name of a column to the file's.
        limit: rows of the file.
        batch_size: rows at once.

    Raises:
        ConfigError: there is no prompt, or there are two; or a number is out of range.
    """

    model: Model
    file: Path | None = None
    prompt: str | None = None
    output: Path | None = None
    decoding: Decoding = field(default_factory=lambda: Decoding(seed=0))
    system: str | None = None
    use_template: bool = True
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if (self.file is None) == (self.prompt is None):
            raise ConfigError("generate: give a file of prompts or one prompt, and not both")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"generate: got batch_size {self.batch_size} and limit {self.limit}, wanted 1 or more")


def generate(request: Prompts, bars: Bars = lambda title, total: nullcontext(lambda rows: None)) -> list[Row]:
    """The rows with the answers to their prompts, one for one and in order; with an output they are written there.

    Args:
        request: What to generate.
        bars: Makes progress bars.

    Raises:
        ConfigError: the request contradicts itself, or names something that does not exist.
        FormatError, ShapeError: a row asks nothing, or an adapter does not fit the model.
    """
    base, adapters = request.model.resolved()
    asked = _read(request, list(adapters))
    if request.output is None:
        return _answered(request, asked, None, bars)
    out, folder = request.output, _folder(request.output)
    settings = _settings(request, base, list(adapters.values()))
    if out.exists() and not (folder / answer_file.SETTINGS).exists():
        raise ConfigError(f"output {out}: exists already; name a new one, or remove it first")
    if not out.exists() and not (folder / answer_file.ANSWERS).exists():
        (folder / answer_file.SETTINGS).unlink(missing_ok=True)  # of an output that was removed
    with answer_file.claimed(folder, settings, out, "generated rows"):
        if out.exists():
            log.info("%s is finished; nothing to do", out)
            return outputs.read_json_lines(out)
        rows = _answered(request, asked, folder, bars)
        outputs.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        (folder / answer_file.ANSWERS).unlink()
    return rows


def _folder(output: Path) -> Path:
    """Where answers are kept until all are there, and settings beyond that."""
    return output.with_name(f"{output.name}.run")


def _read(request: Prompts, adapters: list[str]) -> list[Asked]:
    if request.file is not None:
        return read_asked(request.file, adapters, request.columns, request.limit)
    assert request.prompt is not None
    if len(adapters) > 1:
        raise ConfigError(
            f"{PROMPT}: which adapter is to answer, {' or '.join(adapters)}? Give one, or a file whose column 'adapter'"
            " names them"
        )
    if not request.prompt.strip():
        raise ConfigError(f"{PROMPT}: is blank; give a text")
    return [Asked(PROMPT, {"prompt": request.prompt}, request.prompt, adapter=next(iter(adapters), None))]


def _answered(request: Prompts, asked: list[Asked], folder: Path | None, bars: Bars) -> list[Row]:
    """All rows with their answers, those that an earlier run left in the folder included."""
    speaker, decoding = load_speaker(request.model), request.decoding
    prompts = [row.ids(speaker.tokenizer, request.system, request.use_template) for row in asked]
    check_lengths(speaker.model, prompts, decoding.max_new_tokens)
    written = {row.row: row for row in (answer_file.read_answers(folder, Written) if folder else ())}
    if written:
        log.info("%d of %d rows were answered before; going on", len(written), len(asked))
    with bars("answering", len(asked)) as advance, answer_file.appending(folder) as file:
        advance(len(written))
        # Batches follow from all rows, whatever is done already: they round alike, and draw the same numbers.
        for number, batch in enumerate(batches(prompts, request.batch_size)):
            if all(row in written for row in batch):
                continue
            if decoding.seed is not None:
                torch.manual_seed(decoding.seed + number)
            answers = speaker.answers([prompts[row] for row in batch], [asked[row].adapter for row in batch], decoding)
            for row, ids in zip(batch, answers, strict=True):
                if row not in written:
                    written[row] = Written(row, speaker.text(ids), len(ids))
                    file.add(written[row])
                    advance(1)
    return [
        {**row.row, GENERATED: written[number].text, TOKENS: written[number].tokens} for number, row in enumerate(asked)
    ]


def _settings(request: Prompts, base: str, adapters: list[Path]) -> dict[str, Any]:
    """What decides the answers: the request but for where they go, and stamps of the files that it names."""
    fields = {**asdict(request), "model": {**asdict(request.model), "name": base}}
    del fields["output"]
    plain = json.loads(json.dumps(fields, default=str))
    files = [Path(base).expanduser(), *adapters, *([request.file] if request.file else [])]
    return (
        plain
        | {f"contents of {file}": answer_file.stamp(file) for file in files if file.exists()}
        | {"versions": versions()}
    )
