"""A trainer callback that stops a run whose adapters do nothing."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flashbone.tuner.model.acting import nets


class StopIfInert(TrainerCallback):
    """Makes the net of a model raise a ConfigError where it would warn, after the first backward already."""

    def __init__(self) -> None:
        self._checked = False

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Add the callback, and let the net raise from now on, also in an evaluation before the first step."""
        for net in nets(trainer.model):
            net.raises = True
        trainer.add_callback(cls())

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ):
        if model is not None and not self._checked:
            self._checked = True
            for net, root in nets(model).items():
                net.judge(root, last=True)
