"""A trainer callback that watches rotations: how orthogonal they are, how far they turn, what gradient they get."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flashbone.tuner.layers.layer import BoneLayer
from flashbone.variants.base import RotatingVariant

# What is logged, under these names: `rotation/error/<module>`, and the largest of all modules as `rotation/error`.
ERROR, ANGLE, GRADIENT = "rotation/error", "rotation/angle_deg", "rotation/grad_norm"


class RotationMonitor(TrainerCallback):
    """Adds the figures of all trained blocks of the orthogonal variant to each log of a training loss.

    rotation/error      max |Q^T Q - I|
    rotation/angle_deg  the largest angle, 0 to 180, by which Q turns a plane; without use_orthogonal, that of the
                        orthogonal matrix nearest to it
    rotation/grad_norm  Frobenius norm of the block's gradient, as the optimiser got it (after clipping)

    Each of them as the maximum over all modules, and followed by the name of each module. `attach` puts the callback
    before those that report to files and services, which otherwise would not see the figures. Sharded parameters
    (ZeRO-3, FSDP2) are left out.

    Args:
        per_module: Log the figures of single modules, not only the largest. They are kept in the trainer's state, and
            so in its checkpoints: three numbers for each module and log.
    """

    def __init__(self, per_module: bool = True):
        self.per_module = per_module
        self._blocks: dict[str, tuple[RotatingVariant, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}

    @classmethod
    def attach(cls, trainer: Trainer, per_module: bool = True) -> RotationMonitor:
        """Put a monitor in front of a trainer's callbacks."""
        monitor = cls(per_module)
        trainer.callback_handler.callbacks.insert(0, monitor)
        return monitor

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ):
        self._blocks = {} if model is None else trained_rotations(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        # Kept as tensors: the norms of most steps are never read, and reading waits for the device.
        self._gradients = {name: P.grad.norm() for name, (_, P) in self._blocks.items() if P.grad is not None}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if not logs or "loss" not in logs:
            return
        figures = self._measure()
        logs.update(figures)
        state.log_history[-1].update(figures)

    def _measure(self) -> dict[str, float]:
        by_key: dict[str, dict[str, float]] = {ERROR: {}, ANGLE: {}, GRADIENT: {}}
        for name, (variant, P) in self._blocks.items():
            by_key[ERROR][name], by_key[ANGLE][name] = variant.orthogonality_error(P), variant.angle_deg(P)
            if name in self._gradients:
                by_key[GRADIENT][name] = float(self._gradients[name])
        figures: dict[str, float] = {}
        for key, values in by_key.items():
            rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
            if rounded:
                figures[key] = math.nan if any(map(math.isnan, rounded.values())) else max(rounded.values())
            if self.per_module:
                figures |= {f"{key}/{name}": value for name, value in rounded.items()}
        return figures


def trained_rotations(model: nn.Module) -> dict[str, tuple[RotatingVariant, Tensor]]:
    """The trained blocks of the orthogonal variant, with their settings, by the names of their modules in the base
    model; where a module has several, each is followed by its adapter's name."""
    blocks: dict[str, tuple[RotatingVariant, Tensor]] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, BoneLayer):
            continue
        trained = {
            adapter: (variant, P)
            for adapter, P in module.bone_block.items()
            if isinstance(variant := module.bone_variant[adapter], RotatingVariant) and P.requires_grad and _is_whole(P)
        }
        name = module_name.removeprefix("base_model.model.")
        blocks |= {name if len(trained) == 1 else f"{name}.{adapter}": entry for adapter, entry in trained.items()}
    return blocks


def _is_whole(P: Tensor) -> bool:
    """Not a shard: ZeRO-3 leaves an empty tensor behind, FSDP2 a subclass."""
    return type(P) is nn.Parameter and P.numel() > 0
