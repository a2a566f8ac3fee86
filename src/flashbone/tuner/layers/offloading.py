"""Parameters that hosts take away between calls: into shards (FSDP2, ZeRO-3), host memory or files (accelerate).

Their hooks bring a module's parameters back for its own forward. A bat-col layer reads its base's weight, and every
layer reads its blocks in a ParameterDict, outside of such a forward; this module brings those. docs/distributed.md.
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
    """Within the block, the module's own parameters are whole and on the computing device.

    With sharded parameters every process must enter the block. With `write`, the host keeps what the block has written,
    unless it fails.
    """
    with ExitStack() as stack:
        for host in (_unsharded, _gathered, _onloaded):
            stack.enter_context(host(module, write))
        yield


def is_sharded_or_offloaded(module: nn.Module) -> bool:
    """Whether a host keeps the module's parameters elsewhere between calls; not during an FSDP2 unit's forward."""
    if "_hf_hook" in module.__dict__ and _offload_hook(module) is not None:
        return True
    parameters = _parameters(module).values()
    if not torch.compiler.is_compiling():  # a parameter without attributes is not; asking for one that it lacks is slow
        parameters = [p for p in parameters if type(p) is not nn.Parameter or p.__dict__]
    return any(map(is_sharded, parameters))


def is_materialized(parameter: Tensor | None) -> bool:
    """Whether autograd can use it as it is: not None, a shard, or empty; cheap."""
    return type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel() > 0


def for_autograd(holder: nn.Module, name: str, user: nn.Module) -> Tensor:
    """The parameter `name` of `holder`, whole, for the forward of the module `user` and its backward.

    Raises:
        ConfigError: it is sharded where it cannot be gathered, or offloaded where it cannot be trained.
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
                f"adapter {name!r} was offloaded with the model and cannot be trained: its gradients would be lost; add"
                " it after the model is dispatched, or freeze it"
            )
        with whole(holder):
            return getattr(holder, name)
    return parameter


def prepare_reading(base: nn.Module, user: nn.Module) -> None:
    """Prepare for `user` to read a sharded or offloaded base in forward and backward: ZeRO-3 gathers it for both.

    Raises:
        ConfigError: the base is trained, too; no gradient would reach it.
    """
    for parameter in _parameters(base).values():
        if parameter.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "bat-col reads a trained base layer that its host shards or offloads; freeze it, or"
                " use the variant bat-row"
            )
        if _is_zero(parameter):
            _register_with_zero(user, parameter)


def _parameters(module: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def is_sharded(parameter: Any) -> bool:
    """Whether FSDP2 or ZeRO-3 shards it; one of ZeRO-3 may be gathered now."""
    return _is_sharded(parameter) or _is_zero(parameter)


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")  # a DTensor


@contextmanager
def _unsharded(module: nn.Module, write: bool) -> Iterator[None]:
    """FSDP2: whole copies in place of the shards. Written values go into the memory of the shards."""
    shards: dict[str, Any] = {name: p for name, p in _parameters(module).items() if _is_sharded(p)}
    for name, shard in shards.items():
        module._parameters[name] = nn.Parameter(shard.detach().full_tensor(), shard.requires_grad)
    try:
        yield
        for name, shard in shards.items() if write else ():
            _write_shard(shard, _parameters(module)[name].detach())
    finally:
        module._parameters.update(shards)


def _write_shard(shard: Any, whole_tensor: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    mine = distribute_tensor(whole_tensor, shard.device_mesh, shard.placements, src_data_rank=None)
    shard.detach().to_local().copy_(mine.to_local())


def _is_zero(parameter: Any) -> bool:
    return hasattr(parameter, "ds_status")


def _zero() -> Any:
    return sys.modules["deepspeed"].zero  # imported by whoever has such parameters


def _is_partitioned(parameter: Any) -> bool:
    return _is_zero(parameter) and parameter.ds_status.name == "NOT_AVAILABLE"


@contextmanager
def _gathered(module: nn.Module, write: bool) -> Iterator[None]:
    """ZeRO-3. The values that the main process writes are kept."""
    partitioned = [p for p in _parameters(module).values() if _is_partitioned(p)]
    if not partitioned:
        yield
        return
    with _zero().GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def _register_with_zero(user: nn.Module, parameter: Any) -> None:
    """Make ZeRO-3 gather the parameter for `user`'s forward and backward, and now."""
    if id(parameter) not in getattr(user, "_external_params", {}):
        _zero().register_external_parameter(user, parameter)
    if _is_partitioned(parameter):
        parameter.all_gather()


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return None
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module computes; None for others."""
    hook = _offload_hook(module)
    return None if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


def stop_offloading(holder: nn.Module) -> None:
    """Keep the module's parameters, which are small and may be trained, on the computing device."""
    if _offload_hook(holder) is not None:
        with whole(holder):
            parameters = _parameters(holder)
        remove_hook_from_module(holder)
        holder._parameters.update(parameters)


def check_onloadable(module: nn.Module) -> None:
    """
    Raises:
        ConfigError: PEFT cannot load the weights for a merge from accelerate's own files on disk.
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
    """accelerate. Written values stay in host memory."""
    hook = _offload_hook(module)
    if hook is None or not any(p.is_meta for p in _parameters(module).values()):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
        if write:
            hook.weights_map = {name: tensor.to("cpu") for name, tensor in named_module_tensors(module)}
    finally:
        hook.post_forward(module, None)
