"""The adapter methods of transformers' and diffusers' models: with BONE a failure raises and leaves no trace.

`generate` is one call of the model, and changes of its adapters wait for it.

Both set a flag before they add an adapter. transformers adds the adapter before it reads the weights, and only logs
what the file lacks. Adapters of other methods pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from flashbone.errors import ConfigError
from flashbone.tuner.layers.calls import CURRENT, Gate, one_call
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.loading import adapters_in, ignoring_sizes, no_trace
from flashbone.tuner.model.whole import saved_names

_FLAG = "_hf_peft_config_loaded"
_DOWNLOAD = ("subfolder", "revision", "cache_dir", "token", "local_files_only")


def add_adapter(original: Callable, model: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> Any:
    """`add_adapter` of both hosts; if it fails with a BoneConfig, the model is as it was.

    The head of the config's task is trained and saved, as get_peft_model does by the class of its model.
    """
    if not isinstance(adapter_config, BoneConfig):
        return original(model, adapter_config, *args, **kwargs)
    had_flag, asked = getattr(model, _FLAG), adapter_config.modules_to_save
    adapter_config.modules_to_save = saved_names(adapter_config) or asked
    try:
        with _gate(model).change("add_adapter"):
            return original(model, adapter_config, *args, **kwargs)
    except BaseException:  # Ctrl-C, too
        setattr(model, _FLAG, had_flag)
        adapter_config.modules_to_save = asked
        raise


def save_lora_adapter(
    original: Callable, model: Any, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> Any:
    """diffusers' `save_lora_adapter`, which would write a BONE adapter to a file that nothing can load.

    Raises:
        ConfigError: it is a BONE adapter.
    """
    if adapter_name in adapters_in(model):
        raise ConfigError(
            f"save_lora_adapter: adapter {adapter_name!r} is a BONE adapter, and diffusers loads files of LoRA only;"
            " use peft.get_peft_model(model, config) and its save_pretrained, or peft.get_peft_model_state_dict"
        )
    return original(model, save_directory, adapter_name, *args, **kwargs)


def load_adapter(
    original: Callable,
    model: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`PreTrainedModel.load_adapter`; a BONE adapter that does not fit, or is broken, raises as with PeftModel.

    Raises:
        ShapeError: a block is missing, or a tensor has another shape or belongs to nothing; all of them are named.
        FormatError: the file cannot be read.
    """
    name, load_config = adapter_name or "default", kwargs.get("load_config")
    is_new = name not in adapters_in(model)
    source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    state = args[1] if len(args) > 1 else kwargs.get("adapter_state_dict")
    ignores = kwargs.get("ignore_mismatched_sizes", getattr(load_config, "ignore_mismatched_sizes", False))

    def load_as_peft_does() -> None:
        if is_new and name in adapters_in(model):
            tensors = _read(source, load_config, kwargs) if state is None else state
            plain = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
            # Compares every tensor with the model's before it loads any, and raises on a misfit.
            set_peft_model_state_dict(model, plain, name, ignore_mismatched_sizes=bool(ignores))

    with _gate(model).change("load_adapter"), no_trace(model, name, source), ignoring_sizes(bool(ignores)):
        try:
            info = original(model, peft_model_id, adapter_name, *args, **kwargs)
        except RuntimeError:  # names no tensor
            load_as_peft_does()
            raise
        if info is None or info.missing_keys or info.unexpected_keys:  # older transformers return nothing
            load_as_peft_does()
            for keys in (info.missing_keys, info.unexpected_keys) if info else ():
                keys.clear()  # all are loaded now, else that would have raised
        return info


def generate(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` of a model with adapters of its own: one call, so that layers keep what they build
    between tokens, as with PeftModel."""
    if CURRENT.gate is not None:  # inside a call of a PeftModel, whose rows may have names
        return original(model, *args, **kwargs)
    with one_call(_gate(model)):
        return original(model, *args, **kwargs)


def _gate(model: Any) -> Gate:
    return vars(model).setdefault("_bone_gate", Gate())


def _alone(name: str) -> Callable[..., Any]:
    def switch(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
        with _gate(model).change(name):
            return original(model, *args, **kwargs)

    return switch


# They wait for a `generate` in another thread.
set_adapter, delete_adapter = _alone("set_adapter"), _alone("delete_adapter")
enable_adapters, disable_adapters = _alone("enable_adapters"), _alone("disable_adapters")


def _load_best_model(original: Callable, trainer: Any) -> None:
    """`Trainer._load_best_model`, which looks for an adapter called "default" only: others lie in a folder of their
    name."""
    model, best = trainer.model, trainer.state.best_model_checkpoint
    names = list(getattr(model, "active_adapters", ())) if hasattr(model, "peft_config") else []
    folder = Path(best or "") / (names[0] if names else "")
    is_bone = bool(names) and names[0] != "default" and isinstance(model.peft_config.get(names[0]), BoneConfig)
    if is_bone and (folder / "adapter_config.json").is_file():
        model.load_adapter(str(folder), names[0], is_trainable=True)
    else:
        original(trainer)


def _read(source: Any, load_config: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    arguments = {**getattr(load_config, "download_kwargs", {}), **(kwargs.get("adapter_kwargs") or {}), **kwargs}
    download = {key: arguments[key] for key in _DOWNLOAD if arguments.get(key) is not None}
    return load_peft_weights(str(source), device="cpu", **download)


def create_model_card(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """TRL's `create_model_card`, which writes over the card of a BONE adapter; ours goes back into it."""
    original(trainer, *args, **kwargs)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero() and "default" in adapters_in(model):
        model.create_or_update_model_card(trainer.args.output_dir)
