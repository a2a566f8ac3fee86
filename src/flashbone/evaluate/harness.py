"""Tasks of lm-evaluation-harness, run on a model that is loaded already, with its adapter."""

import difflib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FlashboneError
from flashbone.evaluate.intervals import from_stderr, wilson
from flashbone.evaluate.results import Evaluation, Figure, figure

SHARES = ("acc", "exact_match", "f1", "em")  # beginnings of metrics that are within 0 and 1


def check_installed() -> None:
    """Refuse to go on without the harness.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("tasks: lm-evaluation-harness is not installed; run: pip install 'flashbone[eval]'")


class Tasks:
    """The tasks that were asked for, found before any model is loaded."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None):
        """Look the tasks up.

        Args:
            names: Of tasks, groups or tags, or patterns of names.
            include_path: A folder with task files (YAML) of one's own, which come before the harness's.

        Raises:
            ConfigError: the harness is not installed, the folder is missing, or there is no such task.
        """
        check_installed()
        if include_path is not None and not include_path.is_dir():
            raise ConfigError(f"include-path {include_path}: no such folder; a folder with task files was wanted")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        where = None if include_path is None else str(include_path)
        manager = TaskManager(include_path=where, include_defaults=False) if where else None
        if manager is None or not set(names) <= set(manager.all_tasks):  # reading all of the harness's takes seconds
            manager = TaskManager(include_path=where)
        self.names, self.manager = list(names), manager
        unknown = [name for name in names if not manager.match_tasks([name])]
        if unknown:
            raise ConfigError(f"tasks: {'; '.join(_unknown(name, manager.all_tasks) for name in unknown)}")

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        limit: int | None = None,
        chat_template: bool = False,
    ) -> list[Evaluation]:
        """Run all tasks; one evaluation a task, and one a group that sums its tasks up.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            num_fewshot: Solved examples before each question; None: as the task says.
            batch_size: Requests that are computed at once.
            limit: Of each task, only so many rows.
            chat_template: Put the questions into the tokenizer's chat template.

        Raises:
            FlashboneError: a task cannot be run, for example because its data is not available.
        """
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=self.names,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                task_manager=self.manager,
                apply_chat_template=chat_template,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise FlashboneError(f"tasks {', '.join(self.names)}: the harness failed: {text}") from error
        assert results is not None, "there is one process"
        return evaluations_of(results)  # pyright: ignore[reportArgumentType]


def evaluations_of(results: dict[str, Any]) -> list[Evaluation]:
    """The harness's results as evaluations; a figure's filter is in brackets where it is not "none"."""
    return [_evaluation(name, values, results) for name, values in results["results"].items() if _metrics(values)]


def _evaluation(name: str, values: dict[str, Any], results: dict[str, Any]) -> Evaluation:
    counts = results.get("n-samples", {})
    tasks = [name] if name in counts else results.get("group_subtasks", {}).get(name, [])
    rows = sum(counts[task]["effective"] for task in tasks if task in counts)
    figures = [_figure(metric, filter, value, values, rows) for metric, filter, value in _metrics(values)]
    details = {"num_fewshot": results.get("n-shot", {}).get(name), "version": results.get("versions", {}).get(name)}
    return Evaluation("task", name, rows, figures, details)


def _metrics(values: dict[str, Any]) -> list[tuple[str, str, float]]:
    split = [(*key.split(",", 1), value) for key, value in values.items() if "," in key]
    return [
        (metric, filter, float(value))
        for metric, filter, value in split
        if not metric.endswith("_stderr") and isinstance(value, int | float)
    ]


def _figure(metric: str, filter: str, value: float, values: dict[str, Any], rows: int) -> Figure:
    stderr = values.get(f"{metric}_stderr,{filter}")
    name = metric if filter == "none" else f"{metric} ({filter})"
    if not isinstance(stderr, int | float) or stderr != stderr:
        return figure(name, value)
    is_share = metric.startswith(SHARES) and 0 <= value <= 1
    if is_share and value in (0, 1) and rows:  # all rows alike: their standard error is 0 and means nothing
        return figure(name, value, wilson(int(value) * rows, rows), "wilson")
    low, high = from_stderr(value, float(stderr))
    return figure(name, value, (max(0.0, low), min(1.0, high)) if is_share else (low, high), "stderr")


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them; --include-path adds your own"
    )
    return f"no task {name!r}; {hint}"
