"""One `flashbone eval` from request to figures: check everything that can be checked, load the model once, measure."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from flashbone.errors import ConfigError, FlashboneError
from flashbone.evaluate import answer_file
from flashbone.evaluate.classification import classification
from flashbone.evaluate.exact_match import Answered, answer_rows, make_prompt
from flashbone.evaluate.harness import Tasks
from flashbone.evaluate.intervals import wilson
from flashbone.evaluate.loading import load_labelled_classifier, load_language_model, recorded_max_length
from flashbone.evaluate.perplexity import perplexity
from flashbone.evaluate.request import DTYPES, Request, settled
from flashbone.evaluate.results import RESULTS, EvalResults, Evaluation, figure, read_results
from flashbone.files.outputs import write_text
from flashbone.files.records import to_json
from flashbone.train.data.formats import column_names
from flashbone.train.data.layouts import Example
from flashbone.train.data.loading import load_test_rows
from flashbone.train.summary import versions

log = logging.getLogger(__name__)

TASKS = {"exact_match": "exact_match", "classification": "classification", "perplexity": "sft"}  # a file's format
TestRows = dict[str, list[Example]]  # by the same names

# Makes a bar of so many rows under a title; what it yields is called with the rows that are done.
Bars = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def evaluate(request: Request, bars: Bars = lambda title, total: nullcontext(lambda rows: None)) -> EvalResults:
    """Measure what the request asks for.

    Args:
        request: What to measure.
        bars: Makes progress bars.

    Raises:
        ConfigError: the request contradicts itself, or names something that does not exist.
        FormatError, ShapeError: a file is malformed, or the adapter does not fit the model.
        FlashboneError: memory or disk are full, or a task of the harness failed.
    """
    request = settled(request)
    rows = _read(request)
    tasks = Tasks(request.tasks, request.include_path) if request.tasks else None
    if request.output is None:
        return _measured(request, rows, tasks, bars)
    with answer_file.claimed(request.output, _settings(request)):
        results = read_results(request.output)
        if results is not None:
            log.info("the evaluation in %s is finished; nothing to do", request.output)
            return results
        results = _measured(request, rows, tasks, bars)
        write_text(request.output / RESULTS, to_json(results))
        return results


def _read(request: Request) -> TestRows:
    """The rows of all files, read before the model is loaded, so that bad ones cost no time."""
    files = {name: getattr(request, name) for name in TASKS if getattr(request, name) is not None}
    names = {name: column_names(TASKS[name]) for name in files}
    known = [column for columns in names.values() for column in columns]
    if unknown := [column for column in request.columns if column not in known]:
        others = f", only {', '.join(dict.fromkeys(known))}" if known else ": tasks bring their own rows"
        raise ConfigError(f"columns: {', '.join(unknown)} cannot be renamed{others}")
    return {
        name: load_test_rows(
            path,
            TASKS[name],
            {ours: theirs for ours, theirs in request.columns.items() if ours in names[name]},
            request.limit,
        )
        for name, path in files.items()
    }


def _measured(request: Request, rows: TestRows, tasks: Tasks | None, bars: Bars) -> EvalResults:
    began = time.monotonic()
    with _out_of_memory():
        if request.classification:
            evaluations = [_classified(request, rows, bars)]
        else:
            evaluations = _of_language_model(request, rows, tasks, bars)
    return EvalResults(
        model=request.model,
        adapter=None if request.adapter is None else str(request.adapter),
        merged=request.merge,
        dtype=request.dtype,
        device=request.device,
        limit=request.limit,
        versions=versions(),
        seconds=round(time.monotonic() - began, 1),
        evaluations=evaluations,
    )


def _classified(request: Request, rows: TestRows, bars: Bars) -> Evaluation:
    assert request.classification is not None
    assert request.dtype is not None
    model, tokenizer, labels = load_labelled_classifier(
        request.model,
        request.adapter,
        DTYPES[request.dtype],
        request.device,
        labels=list(request.labels),
        merge=request.merge,
    )
    with bars("classifying", len(rows["classification"])) as advance:
        return classification(
            model,
            tokenizer,
            rows["classification"],
            labels,
            of=str(request.classification),
            batch_size=request.batch_size,
            max_length=request.max_length or recorded_max_length(request.adapter),
            progress=advance,
        )


def _of_language_model(request: Request, rows: TestRows, tasks: Tasks | None, bars: Bars) -> list[Evaluation]:
    assert request.dtype is not None
    model, tokenizer = load_language_model(
        request.model,
        request.adapter,
        DTYPES[request.dtype],
        request.device,
        merge=request.merge,
        vocabulary=request.vocabulary,
    )
    evaluations = []
    if request.perplexity:
        with bars("predicting", len(rows["perplexity"])) as advance:
            evaluations.append(
                perplexity(
                    model,
                    tokenizer,
                    rows["perplexity"],
                    of=str(request.perplexity),
                    batch_size=request.batch_size,
                    max_length=request.max_length or recorded_max_length(request.adapter),
                    progress=advance,
                )
            )
    if request.exact_match:
        evaluations.append(_matched(request, model, tokenizer, rows["exact_match"], bars))
    if tasks is not None:
        evaluations += tasks.run(
            model,
            tokenizer,
            num_fewshot=request.num_fewshot,
            batch_size=request.batch_size,
            limit=request.limit,
            chat_template=request.apply_chat_template,
        )
    return evaluations


def _matched(request: Request, model: Any, tokenizer: Any, questions: list[Example], bars: Bars) -> Evaluation:
    """Exact match, with what an earlier run into the same output answered already."""
    chat = request.chat_template and request.prompt != "alpaca" and tokenizer.chat_template is not None
    asked = [(make_prompt(row["question"], request.prompt, chat), row["answer"]) for row in questions]
    answers = {row.row: row for row in (answer_file.read_answers(request.output) if request.output else ())}
    if answers:
        log.info("%d of %d rows were answered before; going on", len(answers), len(asked))
    with bars("answering", len(asked)) as advance, answer_file.appending(request.output) as file:
        advance(len(answers))
        for answered in answer_rows(
            model,
            tokenizer,
            asked,
            max_new_tokens=request.max_new_tokens,
            batch_size=request.batch_size,
            done=set(answers),
        ):
            file.add(answered)
            answers[answered.row] = answered
            advance(1)
    return exact_match_of(str(request.exact_match), list(answers.values()), request.max_new_tokens)


def exact_match_of(of: str, answered: list[Answered], max_new_tokens: int) -> Evaluation:
    """The share of right answers."""
    hits, total = sum(row.right for row in answered), len(answered)
    details = {
        "right": hits,
        "without_answer": sum(row.answer is None for row in answered),
        "cut_off": sum(row.tokens >= max_new_tokens for row in answered),
        "tokens": sum(row.tokens for row in answered),
    }
    return Evaluation(
        "exact_match", of, total, [figure("exact match", hits / total, wilson(hits, total), "wilson")], details
    )


def _settings(request: Request) -> dict[str, Any]:
    """What decides the results: the request but for where they go, and stamps of the files that it names."""
    fields = {name: value for name, value in vars(request).items() if name != "output"}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    named = [request.model, request.adapter, request.exact_match, request.classification, request.perplexity]
    files = [Path(name).expanduser() for name in named if name is not None]
    stamps = {f"contents of {file}": answer_file.stamp(file) for file in files if file.exists()}
    return plain | stamps | {"versions": versions()}


@contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise FlashboneError(f"the GPU is out of memory; lower --batch-size ({str(error)[:120]})") from error
