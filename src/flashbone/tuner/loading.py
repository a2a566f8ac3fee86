"""Check adapter weights before they are loaded, and take an adapter out of a model again without a trace."""

from __future__ import annotations

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from flashbone.errors import ShapeError
from flashbone.tuner.layer import BoneLayer


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compare the blocks of a checkpoint, whose keys were already mapped to the model's, with the model's own.

    Raises:
        ShapeError: a block has another shape, is missing, or belongs to no module; all of them are named.
    """
    suffix = f".bone_block.{adapter_name}"
    layers = {
        name.removeprefix("_fsdp_wrapped_module."): module
        for name, module in model.named_modules()
        if isinstance(module, BoneLayer) and adapter_name in module.bone_block
    }
    problems = []
    for name, layer in layers.items():
        block, where = layer.bone_block[adapter_name], name.removeprefix("base_model.model.")
        wanted = tuple(getattr(block, "ds_shape", block.shape))
        if (loaded := state_dict.get(name + suffix)) is None:
            problems.append(f"{where}: the checkpoint has no block for it")
        elif tuple(loaded.shape) != wanted:
            problems.append(
                f"{where}: {layer.bone_variant[adapter_name]} adapter has a block of shape {wanted} but the checkpoint"
                f" holds {tuple(loaded.shape)}; was r or the variant changed?"
            )
    for key in state_dict:
        if ".bone_block" in key and key.removesuffix(suffix) not in layers:
            problems.append(f"{key}: the model has no adapted module of that name")
    if problems:
        raise ShapeError(f"adapter {adapter_name!r} does not fit this model: " + "; ".join(problems))


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained now."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def take_back(model: nn.Module, adapter_name: str, trained: list[str]) -> None:
    """Remove an adapter from a model. Layers and saved modules that hold no other one become the originals again, and
    exactly the parameters named by `trained` are trained."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BoneLayer):
            if adapter_name in module.bone_block:
                module.delete_adapter(adapter_name)
            if not module.bone_block:
                _replace(model, name, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            module.delete_adapter(adapter_name, new_active_adapters=[])
            if not module._adapters:
                _replace(model, name, module.original_module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
