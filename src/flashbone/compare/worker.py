"""One run of a comparison, in a process of its own: train, test, save, and write down its figures.

A run leaves in its folder: job.json, log.txt, metrics.jsonl, batches.jsonl, held_out.jsonl, adapter/, and
result.json at the end.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from flashbone.compare.about import this_process
from flashbone.compare.attaching import adapter_bytes, attach, count_trained, save_adapter
from flashbone.compare.config import test_part
from flashbone.compare.measuring import Memory, Stopwatch, Watch
from flashbone.compare.methods import METHODS
from flashbone.compare.results import LossCurve, RunRow, to_json
from flashbone.compare.runs import RunSpec
from flashbone.compare.testing import HeldOut, check_prompts, check_rows, overlap, test
from flashbone.errors import FlashboneError
from flashbone.files.outputs import read_json_lines, whole_or_absent, write_text
from flashbone.train.arguments import trainer_arguments
from flashbone.train.data.loading import load_data
from flashbone.train.data.windows import windows_for
from flashbone.train.fitting import fit
from flashbone.train.folder import RunFolder
from flashbone.train.inert import StopIfInert
from flashbone.train.lengths import limit_length
from flashbone.train.tasks import TASKS
from flashbone.train.trainers import build_trainer

FAILED = 1  # exit code of a run whose error has been written down


def work(plain: dict[str, Any], folder: Path, threads: int | None) -> None:
    """Do a run in this process and leave its row in the folder; the process ends with its parent.

    Args:
        plain: The fields of a `RunSpec`.
        folder: Of the run.
        threads: How many this run may use; None for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what was imported is no garbage; a trainer would look through it several times, 0.3 s each
    if threads:
        torch.set_num_threads(threads)
    if multiprocessing.get_start_method() == "forkserver":  # the data loader's workers end with their parent then
        multiprocessing.set_start_method("fork", force=True)
    spec = RunSpec(**plain)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        _redirect(log)
        try:
            row = execute(spec, folder)
        except Exception as error:  # every failure of a method is a row of the comparison; its traceback is in log.txt
            traceback.print_exc()
            row = spec.row("failed", error=_one_line(error))
    write_text(folder / "result.json", to_json(row))
    for checkpoint in folder.glob("checkpoint-*") if row.status == "ok" else ():  # no run resumes from them
        shutil.rmtree(checkpoint, ignore_errors=True)
    sys.exit(FAILED if row.status == "failed" else 0)


def rehearse(plain: dict[str, Any], answer: Any) -> None:
    """Read the arguments and the data of a run, and send what is wrong with them, or nothing, to `answer`."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        _redirect(nowhere)
        try:
            spec = RunSpec(**plain)
            recipe = spec.to_recipe(Path("rehearsal"))
            args = trainer_arguments(recipe)
            limit_length(recipe, args)
            check_rows(spec, load_data(recipe, windows_for(args), test_part(spec.data)))
            answer.send("")
        except Exception as error:  # whatever it is, each run would end with it
            answer.send(_one_line(error))


def execute(spec: RunSpec, folder: Path) -> RunRow:
    """Train, test and save.

    Raises:
        FlashboneError: the method, the data or the model do not allow it, or the loss diverged.
    """
    began = time.perf_counter()
    recipe, method = spec.to_recipe(folder), METHODS[spec.method]
    write_text(folder / "job.json", json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
    args = trainer_arguments(recipe)
    limit_length(recipe, args)
    data = load_data(recipe, windows_for(args), test_part(spec.data))
    check_rows(spec, data)
    made = this_process(args.device.type)
    memory, startup = Memory(args.device.type == "cuda"), Stopwatch()

    def adapt(model: Any) -> Any:
        if not (hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)):
            model.to(args.device)  # as the trainer does later: what a start computes is computed there
        gc.collect()
        memory.start()
        config = method.config(spec.size, spec.target_modules, TASKS[recipe.task].task_type, spec.settings)
        with startup:
            adapted = attach(model, method, config, spec.seed)
        return _in_fp32(adapted)

    trainer, _ = build_trainer(recipe, args, data, adapt)
    StopIfInert.attach(trainer)
    check_prompts(spec, trainer, data)
    loaded_s = time.perf_counter() - began - startup.seconds
    watch = Watch(trainer, folder / "batches.jsonl", memory)
    HeldOut(spec, trainer, folder / "held_out.jsonl")
    metrics, recorder = fit(trainer, RunFolder(folder), begin=functools.partial(_clear, folder))
    model = trainer.accelerator.unwrap_model(trainer.model)
    size = adapter_bytes(model)
    if not method.is_bound:
        with whole_or_absent(folder / "adapter", replace=True) as place:
            size = save_adapter(model, place)
    adapter_parameters, trainable_parameters = count_trained(model, method)
    curves = read_json_lines(folder / "metrics.jsonl")
    return spec.row(
        "ok",
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        rows={"train": len(data.train), "held_out": len(data.eval or ()), "test": len(data.test or ())},
        overlap=overlap(data),
        train=_curve(curves, "", startup.seconds),
        held_out=_held_out(_curve(curves, "eval_", startup.seconds), folder / "held_out.jsonl"),
        train_s=round(recorder.train_s, 3),
        startup_s=round(startup.seconds, 3),
        load_s=round(loaded_s, 3),
        adapter_bytes=size,
        grad_norm_first=next((row["grad_norm"] for row in metrics.rows if "grad_norm" in row), None),
        adapter_parameters=adapter_parameters,
        trainable_parameters=trainable_parameters,
        about=made,
        **watch.figures(),
        **memory.figures(),
        **test(spec, trainer, data),
    )


def _in_fp32(model: Any) -> Any:
    """Make the trained parameters fp32 for every method; PEFT leaves copies of heads in the base's dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def _clear(folder: Path) -> None:
    (folder / "result.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)


def _curve(rows: list[dict[str, Any]], prefix: str, startup_s: float) -> LossCurve:
    """Losses over steps and over seconds, of rows of metrics.jsonl; and for classifiers the held-out scores."""
    points = [row for row in rows if f"{prefix}loss" in row]

    def values(name: str) -> tuple[float | None, ...]:
        return tuple(None if (v := row[prefix + name]) is None else float(f"{v:.7g}") for row in points)

    names = [name for name in ("accuracy", "macro_f1") if points and prefix and prefix + name in points[0]]
    seconds = tuple(round(startup_s + row["train_s"], 3) for row in points)
    steps = tuple(row["step"] for row in points)
    scores: dict[str, Any] = {name: values(name) for name in names}
    return LossCurve(steps, seconds, values("loss"), **scores)


def _held_out(curve: LossCurve, file: Path) -> LossCurve:
    """The curve with the losses of single rows."""
    lines = {line["step"]: line for line in read_json_lines(file)}
    rows = tuple(tuple(lines[step]["losses"]) for step in curve.step)
    return dataclasses.replace(curve, rows=rows, weights=tuple(lines[curve.step[0]]["weights"]))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, FlashboneError) and text else f"{type(error).__name__}: {text}"


def _redirect(log: Any) -> None:
    """Everything that is printed goes to the run's log, also from below Python."""
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.stdout = sys.stderr = log
    logging.basicConfig(stream=log, level=logging.INFO, force=True)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    with contextlib.suppress(ImportError):
        from datasets.utils import disable_progress_bars

        disable_progress_bars()


def _end_with_parent() -> None:
    """A comparison that was killed leaves no run behind that would go on."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(FAILED)
