"""One run of a comparison, in a process of its own: train, test, save, and write down what came of it.

What a run leaves in its folder: job.json, log.txt, metrics.jsonl, batches.jsonl, adapter/, and result.json at the end.
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

from flashbone.compare import about
from flashbone.compare.config import test_part
from flashbone.compare.jobs import Job
from flashbone.compare.measuring import Memory, Watch, synchronise
from flashbone.compare.methods import METHODS, Method, adapter_bytes, attach, save
from flashbone.compare.testing import check_prompts, check_rows, overlap, test
from flashbone.errors import FlashboneError
from flashbone.files.outputs import read_json_lines, whole_or_absent, write_text
from flashbone.train.arguments import trainer_arguments
from flashbone.train.data.loading import load_data
from flashbone.train.data.windows import windows_for
from flashbone.train.fitting import fit
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import TASK_TYPES
from flashbone.train.trainers import build_trainer

FAILED = 1  # exit code of a run whose error has been written down


def work(plain: dict[str, Any], folder: Path, threads: int | None) -> None:
    """Run a job in this process and leave its result in the folder; the process ends with its parent.

    Args:
        plain: The job's fields.
        folder: Of the run.
        threads: How many this run may use; None for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    if multiprocessing.get_start_method() == "forkserver":  # the data loader's workers end with their parent then
        multiprocessing.set_start_method("fork", force=True)
    job = Job(**plain)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        _redirect(log)
        try:
            result = {"status": "ok", "error": None, **execute(job, folder)}
        except Exception as error:  # every failure of a method is a row of the comparison; its traceback is in log.txt
            traceback.print_exc()
            result = {"status": "failed", "error": _one_line(error)}
    write_text(folder / "result.json", json.dumps(result) + "\n")
    for checkpoint in folder.glob("checkpoint-*") if result["status"] == "ok" else ():  # nothing goes on from them
        shutil.rmtree(checkpoint, ignore_errors=True)
    sys.exit(FAILED if result["status"] == "failed" else 0)


def rehearse(plain: dict[str, Any], answer: Any) -> None:
    """Read the arguments and the data of a job, and send what is wrong with them, or nothing, to `answer`."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        _redirect(nowhere)
        try:
            job = Job(**plain)
            recipe = job.to_recipe(Path("rehearsal"))
            check_rows(job, load_data(recipe, windows_for(trainer_arguments(recipe)), test_part(job.data)))
            answer.send("")
        except Exception as error:  # whatever it is, each run would end with it
            answer.send(_one_line(error))


def execute(job: Job, folder: Path) -> dict[str, Any]:
    """Train and test; returns what is measured, see docs/comparing.md for the fields.

    Raises:
        FlashboneError: the method, the data or the model do not allow it, or the loss diverged.
    """
    began = time.perf_counter()
    recipe, method = job.to_recipe(folder), METHODS[job.method]
    write_text(folder / "job.json", json.dumps(dataclasses.asdict(job), indent=2) + "\n")
    args = trainer_arguments(recipe)
    data = load_data(recipe, windows_for(args), test_part(job.data))
    check_rows(job, data)
    made = about.place(args.device.type)
    memory, startup = Memory(args.device.type == "cuda"), Startup()

    def adapt(model: Any) -> Any:
        if not (hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)):
            model.to(args.device)  # as the trainer does later: what a start computes is computed there
        gc.collect()
        memory.start()
        config = method.config(job.size, job.target_modules, TASK_TYPES[recipe.task], job.settings)
        with startup:
            adapted = attach(model, method, config, job.seed)
        return _in_fp32(adapted)

    trainer, _ = build_trainer(recipe, args, data, adapt)
    check_prompts(job, trainer, data)
    loaded_s = time.perf_counter() - began - startup.seconds
    watch = Watch(trainer, folder / "batches.jsonl", memory)
    metrics, recorder = fit(trainer, RunFolder(folder), begin=functools.partial(_clear, folder))
    model = trainer.accelerator.unwrap_model(trainer.model)
    size = adapter_bytes(model)
    if not method.is_bound:
        with whole_or_absent(folder / "adapter", replace=True) as place:
            size = save(model, method, place)
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "tokens": watch.tokens(),
        "digest": watch.digest(),
        "rows": {"train": len(data.train), "held_out": len(data.eval or ()), "test": len(data.test or ())},
        "overlap": overlap(data),
        **_curves(folder, startup.seconds),
        **test(job, trainer, data),
        "step_ms": watch.step_ms(),
        "train_s": round(recorder.train_s, 3),
        "startup_s": round(startup.seconds, 3),
        "load_s": round(loaded_s, 3),
        **memory.figures(),
        "adapter_bytes": size,
        "grad_norm_first": next((row["grad_norm"] for row in metrics.rows if "grad_norm" in row), None),
        **_parameters(model, method),
        "about": made,
    }


def _in_fp32(model: Any) -> Any:
    """What trains is in fp32, whatever the base is, for every method: PEFT leaves the copies of heads in the base's."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


class Startup:
    """Times a block: making an adapter, with whatever it computes for its start."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        synchronise()
        self.seconds += time.perf_counter() - self._since


def _parameters(model: Any, method: Method) -> dict[str, int]:
    """How many parameters really trained: all, and those of the adapter."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    adapter = 0 if method.is_bound else sum(n for name, n in trained.items() if model.base_model.prefix in name)
    return {"trainable_parameters": sum(trained.values()), "adapter_parameters": adapter}


def _clear(folder: Path) -> None:
    (folder / "result.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)


def _curves(folder: Path, startup_s: float) -> dict[str, Any]:
    """Losses over steps and over seconds; the seconds are those of making the adapter and of training steps."""
    rows = read_json_lines(folder / "metrics.jsonl")

    def curve(prefix: str, names: tuple[str, ...]) -> dict[str, list[Any]]:
        points = [row for row in rows if f"{prefix}loss" in row]
        held = [name for name in names if points and prefix + name in points[0]]
        found = {name: [_short(row[prefix + name]) for row in points] for name in held}
        seconds = [round(startup_s + row["train_s"], 3) for row in points]
        return {"step": [row["step"] for row in points], "seconds": seconds, **found}

    return {"train": curve("", ("loss",)), "held_out": curve("eval_", ("loss", "accuracy", "macro_f1"))}


def _short(value: float | None) -> float | None:
    return value if value is None else float(f"{value:.7g}")


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
