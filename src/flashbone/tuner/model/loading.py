"""Loading that leaves no trace when it fails: weights are checked before any is loaded, new adapters are taken back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from flashbone.errors import FormatError, ShapeError
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.layer import BoneLayer
from flashbone.tuner.model.keys import BLOCK, FSDP1, VALUE, as_now, bare, file_keys, plain
from flashbone.tuner.model.saved_parameters import SavedParameter, forget

_LOADED = "_hf_peft_config_loaded"  # transformers' flag
_ignore_sizes: ContextVar[bool] = ContextVar("ignore_mismatched_sizes", default=False)


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compare a checkpoint, whose keys were already mapped to the model's, with the model.

    Raises:
        ShapeError: a block is missing, or a tensor has another shape, is of integers or belongs to nothing; all of
            them are named.
    """
    blocks, values = f".{BLOCK}.{adapter_name}", f".{VALUE}.{adapter_name}"
    layers = {plain(name): module for name, module in model.named_modules() if isinstance(module, BoneLayer)}
    tensors = {
        plain(name): tensor
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    }
    in_files = file_keys(model)  # so that an error names a wrapped parameter, not its place among wrappers
    loaded_names, problems = set(map(plain, state_dict)), []
    for name in tensors:
        if name.endswith((blocks, values)) and name not in loaded_names:
            what = "block for it" if name.endswith(blocks) else "value for it (parameters_to_save)"
            where = in_files.get(name.removesuffix(f".{adapter_name}"), name.removesuffix(blocks))
            problems.append(f"{_short(where)}: the checkpoint has no {what}")
    sharded = any(FSDP1 in name for name, _ in model.named_modules())
    for key, loaded in state_dict.items():
        name = plain(key)
        present = tensors.get(name, tensors.get(name.removeprefix("base_model.model.")))
        if present is None:
            problems.append(f"{_short(key)}: the model has no such tensor")
            continue
        if present.is_floating_point() and not loaded.is_floating_point():
            problems.append(f"{_short(key)}: the checkpoint holds {loaded.dtype}, wanted floating-point numbers")
            continue
        wanted, got = tuple(getattr(present, "ds_shape", present.shape)), tuple(loaded.shape)
        if wanted == got or sharded or _ignore_sizes.get():
            continue
        layer = layers.get(key.removesuffix(blocks))
        what = f"{layer.bone_variant[adapter_name].name} adapter has a block" if layer else "the model has a tensor"
        problems.append(
            f"{_short(key.removesuffix(blocks))}: {what} of shape {wanted} but the checkpoint holds {got};"
            " was r or the variant changed?"
        )
    if problems:
        raise ShapeError(f"adapter {adapter_name!r} does not fit this model: " + "; ".join(problems))


def _short(name: str) -> str:
    return bare(name.removeprefix("base_model.model."))


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained now."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def take_back(model: nn.Module, adapter_name: str, trained: list[str]) -> None:
    """Remove an adapter from a model. Layers and saved modules that hold no other one become the originals again, and
    exactly the parameters named by `trained` are trained."""
    forget(model, adapter_name)
    for name, module in reversed(list(model.named_modules())):  # what is inside others comes first
        if isinstance(module, BoneLayer):
            if adapter_name in module.bone_block:
                module.delete_adapter(adapter_name)
            if not module.bone_block:
                _replace(model, name, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            remaining = [other for other in module.active_adapters if other != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=remaining)
            if not module._adapters:
                _replace(model, name, module.original_module)
    kept = set(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in kept


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapters_in(model: nn.Module) -> set[str]:
    return {name for module in model.modules() if isinstance(module, BoneLayer) for name in module.bone_block}


@contextmanager
def ignoring_sizes(ignores: bool) -> Iterator[None]:
    """Within the block, loads ignore tensors of other sizes (`ignore_mismatched_sizes`)."""
    token = _ignore_sizes.set(ignores)
    try:
        yield
    finally:
        _ignore_sizes.reset(token)


@contextmanager
def no_trace(model: nn.Module, adapter_name: str, source: object) -> Iterator[None]:
    """If the block fails, `model` (the bare one, without PeftModel around it) is as it was before: without the adapter
    if that is new, merged as it was, with the same adapters active, the same parameters trained and the same modules
    in training mode. Errors of unreadable files become ours."""
    is_new, trained = adapter_name not in adapters_in(model), trained_names(model)
    kept = {name: vars(model).get(name) for name in ("peft_config", _LOADED)}
    modes = {module: module.training for module in model.modules()}
    holders = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = {module: list(module.active_adapters) for module in holders}
    merged = {m: list(m.merged_adapters) for m in model.modules() if isinstance(m, (BoneLayer, SavedParameter))}
    try:
        yield
    except Exception as error:
        if adapter_name not in adapters_in(model):
            raise
        if is_new:
            for module, names in active.items():
                if list(module.active_adapters) != names:
                    module.set_adapter(names)
            take_back(model, adapter_name, trained)
            getattr(model, "peft_config", {}).pop(adapter_name, None)
            for name, value in kept.items():
                if value is None:
                    vars(model).pop(name, None)
            for module, mode in modes.items():
                module.training = mode
            for layer, names in merged.items():
                if names and not layer.merged:
                    layer.merge(adapter_names=names)
        if isinstance(error, SafetensorError):
            raise FormatError(f"adapter {source}: its weights cannot be read: {error}; is the file whole?") from error
        if isinstance(error, KeyError):
            raise FormatError(f"adapter {source}: its weights lack {error}, which its config names") from error
        raise


@contextmanager
def _as_dispatched(model: Any, model_id: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Leave an offloaded model as accelerate dispatched it: blocks are not offloaded, and base layers keep their hooks.

    PEFT would take the hooks away and dispatch the model anew, from files that it rewrites for LoRA's names.
    """
    device_map = vars(model).get("hf_device_map") or {}
    if not {"cpu", "disk"} & set(device_map.values()) or not _is_bone(model_id, kwargs):
        yield
        return
    del model.hf_device_map
    try:
        yield
    finally:
        model.hf_device_map = device_map


def _is_bone(model_id: Any, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("config") is not None:
        return kwargs["config"].peft_type == "BONE"
    where = ("subfolder", "revision", "cache_dir", "token")
    try:
        return PeftConfig._get_peft_type(model_id, **{key: kwargs[key] for key in where if key in kwargs}) == "BONE"
    except Exception:  # PEFT then says itself that there is no adapter
        return False


def wrap_peft_model(peft_model: Any) -> None:
    """Wrap `PeftModel.from_pretrained` and `load_adapter` so that a BONE adapter that cannot be loaded leaves no trace,
    calls so that `BoneModel` knows of those without adapters, too, and what adds, loads and deletes adapters so that it
    waits for calls as a whole.

    PEFT adds the adapter before it reads the weights, and tells its tuners of neither. Other methods' adapters pass
    through untouched.
    """
    peft_model._enable_peft_forward_hooks = _known_calls(peft_model._enable_peft_forward_hooks)
    peft_model.load_adapter = _clean_load_adapter(peft_model.load_adapter)
    for name in ("add_adapter", "load_adapter", "delete_adapter"):
        setattr(peft_model, name, _between_calls(getattr(peft_model, name)))
    peft_model.from_pretrained = classmethod(_clean_from_pretrained(peft_model.from_pretrained.__func__))


def names_as_now(original: Callable) -> Callable:
    """PEFT's `set_peft_model_state_dict`, which looks for modules that are trained whole before it asks its tuners."""

    @functools.wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        state, config = peft_model_state_dict, model.peft_config.get(adapter_name)
        if config is not None and config.peft_type == "BONE":
            state = as_now(model, state, adapter_name)
        return original(model, state, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


def _known_calls(original: Callable) -> Callable:
    @functools.wraps(original)
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(type(self.base_model), "gate"):  # not of the model: a compiled call cannot make the gate
            return original(self, *args, **kwargs)
        if self._adapters_disabled:
            kwargs.pop("adapter_names", None)
        return self.base_model._enable_peft_forward_hooks(*args, **kwargs)

    return _enable_peft_forward_hooks


def _between_calls(original: Callable) -> Callable:
    @functools.wraps(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate = getattr(self.base_model, "gate", None)
        with gate.change(original.__name__) if gate else nullcontext():
            return original(self, *args, **kwargs)

    return change


def _clean_load_adapter(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "get_base_model"):  # PeftMixedModel borrows this method, and holds no BONE
            return original(self, model_id, adapter_name, *args, **kwargs)
        for layer in self.modules():
            if isinstance(layer, BoneLayer):
                offloading.stop_offloading(layer.bone_block)
        model, ignores = self.get_base_model(), bool(kwargs.get("ignore_mismatched_sizes", False))
        with (
            no_trace(model, adapter_name, model_id),
            ignoring_sizes(ignores),
            _as_dispatched(model, model_id, kwargs),
        ):
            return original(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def _clean_from_pretrained(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(
        cls: Any, model: nn.Module, model_id: Any, adapter_name: str = "default", *a: Any, **k: Any
    ) -> Any:
        with no_trace(model, adapter_name, model_id), _as_dispatched(model, model_id, k):
            return original(cls, model, model_id, adapter_name, *a, **k)

    return from_pretrained
