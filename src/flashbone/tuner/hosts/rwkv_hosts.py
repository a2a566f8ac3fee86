"""What RWKV models of other libraries do with weights past the layers' own forward, and what keeps adapters right.

transformers' RWKV-4 (`rescale_every`) halves its hidden states every few blocks in eval mode, against overflow in fp16,
and divides the weights of two layers of each block along: in place, at the first call. What an adapter adds would not
be divided, a merge would mix both scales, and unmerging would restore the weight of the other mode. Powers of two
commute with rounding, so the outputs of attention and feed-forward are divided instead, by the same numbers: the base
gives the same bits (but for an fp16 product that overflows before it is divided), and no weight ever changes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flashbone.errors import ConfigError
from flashbone.tuner.layers.layer import BoneLayer


def settle(model: nn.Module) -> None:
    """Make the RWKV models among the modules of `model`, which has just got an adapter, right with it.

    A model that is settled stays so, without adapters, too. Nothing happens to others.

    Raises:
        ConfigError: weights stand rescaled that cannot be scaled back, or an adapter is where it would do nothing.
    """
    for name, module in model.named_modules():
        if callable(getattr(type(module), "_rescale_layers", None)):
            _rescale_outputs_not_weights(module)
        elif type(module).__name__ == "RWKV6Attention":  # flash-linear-attention's
            _check_read_layer(f"{name}.x_proj.2", module)


def _rescale_outputs_not_weights(rwkv: Any) -> None:
    if _set_divisors in rwkv._forward_pre_hooks.values():
        return
    if rwkv.layers_are_rescaled and rwkv.config.rescale_every > 0:
        weight = rwkv.blocks[0].attention.output.weight
        if hasattr(weight, "SCB") or hasattr(weight, "quant_state"):
            raise ConfigError(
                f"{type(rwkv).__name__} was called in eval mode, which rescaled its quantised weights for good; load it"
                " again, and put the adapter in before the first call"
            )
        mode, rwkv.training = rwkv.training, True
        rwkv._rescale_layers()  # as before a training: exact
        rwkv.training = mode
    rwkv.register_forward_pre_hook(_set_divisors)
    for block in rwkv.blocks:
        block.attention.register_forward_hook(_divided)
        block.feed_forward.register_forward_hook(_divided)


def _set_divisors(rwkv: Any, args: Any) -> None:
    """Before each call: the model takes its weights for rescaled where they ought to be, and halves hidden states."""
    rwkv.layers_are_rescaled = not rwkv.training
    every = rwkv.config.rescale_every
    for i, block in enumerate(rwkv.blocks):
        divisor = 2 ** (i // every) if every > 0 and not rwkv.training else 1
        block.attention.output_divisor = block.feed_forward.output_divisor = divisor


def _divided(module: Any, args: Any, outputs: tuple) -> tuple:
    """The outputs (hidden states, state) of an attention or a feed-forward, with the hidden states divided."""
    hidden, *state = outputs
    return (hidden if module.output_divisor == 1 else hidden / module.output_divisor, *state)


def _check_read_layer(name: str, attention: Any) -> None:
    if isinstance(attention.x_proj[2], BoneLayer):
        raise ConfigError(
            f"{name}: {type(attention).__name__} reads the weight of this layer and never calls it, so that an adapter"
            ' would do nothing; put "x_proj.2" into exclude_modules'
        )
