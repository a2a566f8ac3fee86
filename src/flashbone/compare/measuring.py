"""What is measured while a run trains: the rows that it learns and their order, the time of each step, its memory."""

import contextlib
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flashbone.files.outputs import read_json_lines, write_text

WARM_UP = 2  # steps that are not timed: kernels are chosen and memory is got in them
_STATUS = Path("/proc/self/status")


class Watch(TrainerCallback):
    """Writes down the batches that are learned, and times the steps.

    Batches are hashed with their labels; one line of `batches.jsonl` is the step, the hash, and how many tokens are
    learned. A resumed run drops the lines after its checkpoint, as its metrics do.

    Args:
        trainer: Whose training is watched; `training_step` is wrapped, since no callback sees a batch.
        file: `batches.jsonl`.
        memory: Told of each step.
    """

    def __init__(self, trainer: Any, file: Path, memory: "Memory"):
        self.file, self.memory = file, memory
        self.durations: list[float] = []
        self._since: float | None = None
        self._trainer, self._step = trainer, trainer.training_step
        trainer.training_step = self._watched
        trainer.add_callback(self)

    def _watched(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        row = {"step": self._trainer.state.global_step, **_about(inputs)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return self._step(model, inputs, *args, **kwargs)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        kept = [row for row in read_json_lines(self.file, after_kill=True) if row["step"] < state.global_step]
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in kept))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.memory.begin_step()
        synchronise()
        self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._since is not None:
            synchronise()
            self.durations.append(time.perf_counter() - self._since)
            self.memory.end_step()

    def figures(self) -> dict[str, Any]:
        """Fields of `RunRow`: the digest and the tokens of all batches, and the median time of a step."""
        rows = read_json_lines(self.file)
        timed = self.durations[WARM_UP:] or self.durations
        return {
            "digest": _digest("".join(row["digest"] for row in rows).encode()),
            "tokens": sum(row["tokens"] for row in rows),
            "step_ms": round(1000 * statistics.median(timed), 3) if timed else None,
        }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _about(inputs: Any) -> dict[str, Any]:
    """A batch's hash and its number of tokens."""
    tensors = [inputs[name].detach().cpu().numpy().tobytes() for name in ("input_ids", "labels") if name in inputs]
    mask = inputs.get("attention_mask")
    tokens = inputs["input_ids"].numel() if mask is None else int((mask != 0).sum())
    return {"digest": _digest(*tensors), "tokens": tokens}


def synchronise() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Stopwatch:
    """Times a block, whatever it started on a GPU included."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        synchronise()
        self.seconds += time.perf_counter() - self._since


class Memory:
    """Peak memory within training steps, on the GPU or resident; evaluating, testing and saving are left out.

    Args:
        on_gpu: Whether the run uses a GPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._base: float | None = None
        self._peak: float | None = None

    def start(self) -> None:
        """Count from here: the model has been loaded, and nothing was done to it yet."""
        self._base = torch.cuda.memory_allocated() / 2**20 if self._on_gpu else _status_mib("VmRSS")

    def begin_step(self) -> None:
        """Forget the peaks before this step."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now

    def end_step(self) -> None:
        """Take the peak of this step into account."""
        peak = torch.cuda.max_memory_allocated() / 2**20 if self._on_gpu else _status_mib("VmHWM")
        if peak is not None:
            self._peak = max(peak, self._peak or 0.0)

    def figures(self) -> dict[str, Any]:
        """Fields of `RunRow`; None where the system does not tell."""
        above = None if self._peak is None or self._base is None else round(self._peak - self._base, 1)
        return {
            "peak_mib": None if self._peak is None else round(self._peak, 1),
            "peak_of": "GPU memory allocated" if self._on_gpu else "resident memory",
            "above_model_mib": above,
        }


def _status_mib(name: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return None
