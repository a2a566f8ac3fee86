"""Training of RWKV models: parts trained beside the adapter, long sequences, the L2-wrap, the rate of time_decay."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from trl.trainer.sft_trainer import SFTTrainer

from flashbone.errors import ConfigError
from flashbone.rwkv import time_state
from flashbone.rwkv.loss import wrapped
from flashbone.rwkv.model import RwkvForCausalLM
from flashbone.train.recipe import RwkvSettings

TILE = 1024  # tokens whose logits are in memory at a time
_NORMS = ["ln0", "ln1", "ln2", "ln_x", "ln_out"]


def prepare(model: RwkvForCausalLM, settings: RwkvSettings, args: Any) -> dict[str, list[str]]:
    """Set the model up for training; returns what is to be trained along, as fields of BoneConfig.

    Raises:
        ConfigError: the settings or the trainer's arguments do not fit the model.
    """
    if args.padding_free or (args.packing and args.packing_strategy != "wrapped"):
        raise ConfigError(
            "training: an RWKV model's state would run from one packed sequence into the next; leave packing and"
            " padding_free out, or set packing_strategy: wrapped"
        )
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    if settings.chunk_ctx and (kwargs or {}).get("use_reentrant"):
        raise ConfigError("rwkv.chunk_ctx: does not go with use_reentrant: true, which DDP fails on; leave that out")
    model.chunk_ctx, model.carries_gradient = settings.chunk_ctx, settings.carry_gradient
    along: dict[str, list[str]] = {}
    if "ln" in settings.train_parts:
        ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        along["modules_to_save"] = [name for name in _NORMS if name in ends]
    if "time" in settings.train_parts:
        ends = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
        along["parameters_to_save"] = sorted({end for end in ends if end.startswith("time_")})
        if not along["parameters_to_save"]:
            raise ConfigError("rwkv.train_parts: this model has no time_* values, which are RWKV-6's; leave time out")
    if "state" in settings.train_parts:
        along.setdefault("parameters_to_save", []).append(time_state.NAME)
    return along


class RwkvTrainer(SFTTrainer):
    """TRL's SFTTrainer with the extras of RWKV's own training."""

    def __init__(self, *args: Any, settings: RwkvSettings, **kwargs: Any) -> None:
        self._settings = settings
        super().__init__(*args, **kwargs)
        assert self.model is not None
        for parameter in self.model.parameters():  # PEFT leaves LayerNorms in bf16, where small steps round to none
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's optimizer, with separate groups for the decays."""
        optimizer = super().create_optimizer(*args, **kwargs)
        assert self.model is not None
        decays = {parameter for name, parameter in self.model.named_parameters() if ".time_decay." in name}
        for group in list(optimizer.param_groups):
            inside = [parameter for parameter in group["params"] if parameter in decays]
            if inside and self._settings.time_decay_lr != 1:
                group["params"] = [parameter for parameter in group["params"] if parameter not in decays]
                rest = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group({**rest, "params": inside, "lr": group["lr"] * self._settings.time_decay_lr})
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; with the L2-wrap in its gradient, if that was asked for."""
        if not (self._settings.l2_wrap and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        seen: list[torch.Tensor] = []
        handle = base.ln_out.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            handle.remove()
        learned = inputs["labels"][:, 1:] != -100
        squares = _squares(base.get_output_embeddings(), seen[0][:, :-1][learned])
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            squares = squares * self.accelerator.num_processes  # as TRL does with the loss
        items = learned.sum() if num_items_in_batch is None else num_items_in_batch
        if return_outputs:
            return wrapped(loss[0], squares, items), loss[1]
        return wrapped(loss, squares, items)


def _squares(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The sum of the squares of each token's largest logit, some tokens at a time."""

    def of(tile: torch.Tensor) -> torch.Tensor:
        return head(tile).float().amax(-1).square().sum()

    return torch.stack([checkpoint(of, tile, use_reentrant=False) for tile in hidden.split(TILE)]).sum()  # pyright: ignore[reportArgumentType]
