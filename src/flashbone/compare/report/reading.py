"""A results.jsonl becomes a `Comparison`, or one error that names the line and everything wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flashbone.compare.report.results import Comparison, Curve, Header, Method, Run
from flashbone.errors import FormatError

Kind = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _or_none(kind: Kind) -> Kind:
    return (lambda value: value is None or kind[0](value)), f"{kind[1]} or null"


def _list_of(kind: Kind) -> Kind:
    return (lambda value: isinstance(value, list) and all(map(kind[0], value))), f"a list, each {kind[1]}"


def _one_of(*values: Any) -> Kind:
    return (lambda value: value in values), " or ".join(json.dumps(v) for v in values)


TEXT: Kind = (lambda value: isinstance(value, str), "a text")
WHOLE: Kind = (_is_whole, "a whole number")
NUMBER: Kind = (_is_number, "a number")
SWITCH: Kind = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Kind = (lambda value: isinstance(value, dict), "an object")

# Field -> what it has to be. Fields that nothing here needs are not looked at: later versions may write more.
HEADER = {
    "version": _one_of(1),
    "name": TEXT,
    "model": TEXT,
    "task": TEXT,
    "metric": _one_of("accuracy", "loss", "exact_match"),
    "higher_is_better": SWITCH,
    "data": OBJECT,
    "seeds": _list_of(WHOLE),
    "device": TEXT,
    "versions": OBJECT,
    "fairness": OBJECT,
    "finished": SWITCH,
}
HEADER_OPTIONAL = {
    "config": TEXT,
    "budget": OBJECT,
    "tolerance": NUMBER,
    "steps": WHOLE,
    "epochs": NUMBER,
    "hardware": TEXT,
    "jobs": WHOLE,
    "commit": TEXT,
    "date": TEXT,
    "command": TEXT,
}
METHOD = {
    "method": TEXT,
    "title": TEXT,
    "size": TEXT,
    "matched": SWITCH,
    "bound": SWITCH,
    "learning_rates": _list_of(NUMBER),
    "status": _one_of("ok", "failed", "unfinished"),
}
METHOD_OPTIONAL = {
    "peft_type": TEXT,
    "settings": OBJECT,
    "fixed": SWITCH,
    "adapter_parameters": WHOLE,
    "trainable_parameters": WHOLE,
    "total_parameters": WHOLE,
    "off_budget": NUMBER,
    "chosen": NUMBER,
    "at_edge": _one_of("lowest", "highest"),
    "error": TEXT,
    "rerun": TEXT,
    "train": TEXT,
}
RUN = {"method": TEXT, "seed": WHOLE, "counted": SWITCH, "status": _one_of("ok", "failed")}
RUN_OPTIONAL = {
    "learning_rate": NUMBER,
    "error": TEXT,
    "steps": WHOLE,
    "tokens": WHOLE,
    "digest": TEXT,
    "train": OBJECT,
    "held_out": OBJECT,
    "test": OBJECT,
    "test_scores": _list_of(_or_none(NUMBER)),
    "test_weights": _list_of(_or_none(NUMBER)),
    "peak_of": TEXT,
    **dict.fromkeys(("step_ms", "train_s", "startup_s", "load_s", "peak_mib"), NUMBER),
    **dict.fromkeys(("above_model_mib", "adapter_bytes", "grad_norm_first"), NUMBER),
}
CURVE = {"step": _list_of(WHOLE), "seconds": _list_of(_or_none(NUMBER)), "loss": _list_of(_or_none(NUMBER))}


def read_results(path: Path) -> Comparison:
    """Read and check a results.jsonl; an unfinished comparison and failed methods are no errors.

    Raises:
        FormatError: the file is missing, or a line of it is broken: where, what was got, what was wanted.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as a results.jsonl: {error}") from error
    header, methods, runs = None, [], []
    # Not splitlines, which cuts at characters that a title may hold, too.
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        row = _object(line, where)
        kind = row.get("kind")
        if (kind == "comparison") != (number == 1):
            _fail(where, f"got {_short(kind)} as kind; the comparison comes in line 1 and nowhere else")
        if kind == "comparison":
            header = _header(row, where)
        elif kind == "method":
            methods.append(_method(row, where, methods))
        elif kind == "run":
            runs.append(_run(row, where, methods, runs))
        else:
            _fail(where, f"got {_short(kind)} as kind, wanted method or run")
    if header is None:
        _fail(str(path), "the file is empty; wanted what `flashbone compare` writes")
    return Comparison(header, tuple(methods), tuple(runs))


def _fail(where: str, what: str) -> NoReturn:
    raise FormatError(f"{where}: {what}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: is no JSON ({error}); was the file cut off?") from error
    if not isinstance(row, dict):
        _fail(where, f"got {_short(row)}, wanted a JSON object")
    return row


def _check(row: dict[str, Any], where: str, needed: dict[str, Kind], optional: dict[str, Kind]) -> None:
    """Raise for all wrong fields at once."""
    kinds = {**needed, **{name: _or_none(kind) for name, kind in optional.items()}}
    wrong = [f"{name} is missing" for name in needed if name not in row]
    wrong += [
        f"{name}: got {_short(row[name])}, wanted {words}"
        for name, (fits, words) in kinds.items()
        if name in row and not fits(row[name])
    ]
    if wrong:
        _fail(where, "; ".join(wrong))


def _fields(row: dict[str, Any], *kinds: dict[str, Kind]) -> dict[str, Any]:
    """The known fields, lists as tuples."""
    known = {name: row.get(name) for part in kinds for name in part}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def _header(row: dict[str, Any], where: str) -> Header:
    _check(row, where, HEADER, HEADER_OPTIONAL)
    lists = {"checked": _list_of(TEXT), "problems": _list_of(TEXT)}
    _check(row["fairness"], f"{where}, fairness", {}, lists)
    fields = _fields(row, HEADER, HEADER_OPTIONAL)
    del fields["version"], fields["fairness"]
    fields.update({name: tuple(row["fairness"].get(name) or ()) for name in lists})
    return Header(**fields)


def _method(row: dict[str, Any], where: str, before: list[Method]) -> Method:
    _check(row, where, METHOD, METHOD_OPTIONAL)
    if any(other.method == row["method"] for other in before):
        _fail(where, f"the method {_short(row['method'])} is there twice")
    fields = _fields(row, METHOD, METHOD_OPTIONAL)
    return Method(**{**fields, "settings": fields["settings"] or {}, "fixed": bool(fields["fixed"])})


def _run(row: dict[str, Any], where: str, methods: list[Method], before: list[Run]) -> Run:
    _check(row, where, RUN, RUN_OPTIONAL)
    fields = _fields(row, RUN, RUN_OPTIONAL)
    key = fields["method"], fields["learning_rate"], fields["seed"]
    if key[0] not in {method.method for method in methods}:
        _fail(where, f"got a run of {_short(key[0])}, which no line before it describes")
    if any((run.method, run.learning_rate, run.seed) == key for run in before):
        _fail(where, f"the run of {key[0]} with learning rate {key[1]} and seed {key[2]} is there twice")
    curves = {name: _curve(row.get(name), f"{where}, {name}") for name in ("train", "held_out")}
    test = fields["test"] or {}
    _check(test, f"{where}, test", {}, dict.fromkeys(test, NUMBER))
    run = Run(**{**fields, **curves, "test": test})
    _check_scores(run, where, before)
    return run


def _curve(row: dict[str, Any] | None, where: str) -> Curve | None:
    if row is None:
        return None
    _check(row, where, CURVE, {})
    fields = _fields(row, CURVE)
    lengths = {name: len(values) for name, values in fields.items() if values is not None}
    if len(set(lengths.values())) > 1:
        _fail(where, "got " + ", ".join(f"{n} {name}s" for name, n in lengths.items()) + "; wanted as many of each")
    return Curve(**fields)


def _check_scores(run: Run, where: str, before: list[Run]) -> None:
    """Rows are paired between runs, so every run has to score the same ones."""
    if run.test_scores is None:
        return
    rows = len(run.test_scores)
    if len(run.test_weights or ()) != rows:
        _fail(where, f"got {rows} test_scores and {len(run.test_weights or ())} test_weights; wanted one of each a row")
    other = next((len(r.test_scores) for r in before if r.test_scores is not None), rows)
    if other != rows:
        _fail(where, f"got the scores of {rows} test rows, but a run before it has {other}; rows must be the same")
