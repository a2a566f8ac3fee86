"""Where hosts keep parameters between calls: in shards (FSDP2, ZeRO-3), in host memory or on disk (accelerate).

Their hooks bring a module's parameters for its own forward. A bat-col layer reads its base's weight, and every layer
its blocks in a ParameterDict, outside of that: here is what brings these. docs/distributed.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import named_module_tensors
from torch import Tensor, nn

from flashbone.errors import ConfigError


@contextmanager
def whole(module: nn.Module, write: bool = False) -> Iterator[None]:
    """Within the block the module's own parameters are whole, on the device that computes; nothing for a plain module.

    Of sharded parameters, every process has to come here. With `write`, the host then keeps what the block has made of
    them; if it fails, what there was.
    """
    with ExitStack() as stack:
        for host in (_unsharded, _gathered, _onloaded):
            stack.enter_context(host(module, write))
        yield


def is_sharded_or_offloaded(module: nn.Module) -> bool:
    """Whether a host takes the module's parameters away between its calls. Not so under FSDP2 while the forward of
    the unit runs that the module is a part of."""
    return _offload_hook(module) is not None or any(map(is_sharded, _own(module).values()))


def is_materialized(parameter: Tensor | None) -> bool:
    """Whether autograd can use it as it is; cheap. None, a shard, and a place without numbers are not."""
    return type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel() > 0


def for_autograd(holder: nn.Module, name: str, user: nn.Module) -> Tensor:
    """The parameter `name` of `holder`, whole, as `user` needs it in its own forward and in backward.

    Raises:
        ConfigError: a host keeps it such that it could not be trained, or not be gathered.
    """
    parameter = getattr(holder, name)
    if _is_zero(parameter):
        _register_with_zero(user, parameter)
    elif _is_sharded(parameter):
        raise ConfigError(
            f"adapter {name!r} is a shard while its layer runs: FSDP2 wraps {type(holder).__name__} on its own; wrap"
            " whole decoder layers (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)"
        )
    elif parameter.is_meta and _offload_hook(holder) is not None:
        if parameter.requires_grad and user.training and torch.is_grad_enabled():
            raise ConfigError(
                f"adapter {name!r} was offloaded with the model, so that it cannot be trained, its gradients would be"
                " lost; add it after the model is dispatched, or freeze it"
            )
        with whole(holder):
            return getattr(holder, name)
    return parameter


def prepare_reading(base: nn.Module, user: nn.Module) -> None:
    """Before `user`'s forward reads a base that comes and goes, and its backward once more: ZeRO-3 brings it for both.

    Raises:
        ConfigError: the base is trained, too: no gradient would reach it.
    """
    for parameter in _own(base).values():
        if parameter.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "bat-col reads a base layer that is trained along, and that its host shards or offloads; freeze it, or"
                " use the variant bat-row"
            )
        if _is_zero(parameter):
            _register_with_zero(user, parameter)


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def is_sharded(parameter: Any) -> bool:
    """Whether FSDP2 or ZeRO-3 has taken it into its shards; ZeRO-3's may be gathered now."""
    return _is_sharded(parameter) or _is_zero(parameter)


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")  # a DTensor


@contextmanager
def _unsharded(module: nn.Module, write: bool) -> Iterator[None]:
    """FSDP2: whole copies in place of the shards. What is written goes into the shards' own memory: it gathers that."""
    shards: dict[str, Any] = {name: p for name, p in _own(module).items() if _is_sharded(p)}
    for name, shard in shards.items():
        module._parameters[name] = nn.Parameter(shard.detach().full_tensor(), shard.requires_grad)
    try:
        yield
        for name, shard in shards.items() if write else ():
            _write_shard(shard, _own(module)[name].detach())
    finally:
        module._parameters.update(shards)


def _write_shard(shard: Any, whole_tensor: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    mine = distribute_tensor(whole_tensor, shard.device_mesh, shard.placements, src_data_rank=None)
    shard.detach().to_local().copy_(mine.to_local())


def _is_zero(parameter: Any) -> bool:
    return hasattr(parameter, "ds_status")


def _zero() -> Any:
    return sys.modules["deepspeed"].zero  # whoever has such parameters has imported it


def _is_partitioned(parameter: Any) -> bool:
    return _is_zero(parameter) and parameter.ds_status.name == "NOT_AVAILABLE"


@contextmanager
def _gathered(module: nn.Module, write: bool) -> Iterator[None]:
    """ZeRO-3. What is written is the main process's."""
    partitioned = [p for p in _own(module).values() if _is_partitioned(p)]
    if not partitioned:
        yield
        return
    with _zero().GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def _register_with_zero(user: nn.Module, parameter: Any) -> None:
    """From now on ZeRO-3 brings the parameter for `user`'s forward and backward; now it comes at once."""
    if id(parameter) not in getattr(user, "_external_params", {}):
        _zero().register_external_parameter(user, parameter)
    if _is_partitioned(parameter):
        parameter.all_gather()


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = module.__dict__.get("_hf_hook")
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module computes; None for others."""
    hook = _offload_hook(module)
    return None if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


def stop_offloading(holder: nn.Module) -> None:
    """Take the module's parameters out of offloading, to where it computes: small ones, that may be trained."""
    if _offload_hook(holder) is not None:
        with whole(holder):
            parameters = _own(holder)
        remove_hook_from_module(holder)
        holder._parameters.update(parameters)


def check_onloadable(module: nn.Module) -> None:
    """
    Raises:
        ConfigError: PEFT cannot bring the weights for a merge: they are offloaded to disk in accelerate's own files.
    """
    hook = _offload_hook(module)
    if hook is None or torch.device("meta") not in hook.original_devices.values():
        return
    index = getattr(getattr(hook.weights_map, "dataset", None), "index", {})
    if any("safetensors_file" not in entry for entry in index.values()):
        raise ConfigError(
            "its weight is offloaded to a .dat file, which cannot be merged into; load the model with from_pretrained"
            " and a device_map, or merge the files with `flashbone merge`"
        )


@contextmanager
def _onloaded(module: nn.Module, write: bool) -> Iterator[None]:
    """accelerate. What is written stays in host memory."""
    hook = _offload_hook(module)
    if hook is None or not any(p.is_meta for p in _own(module).values()):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
        if write:
            hook.weights_map = {name: tensor.to("cpu") for name, tensor in named_module_tensors(module)}
    finally:
        hook.post_forward(module, None)
