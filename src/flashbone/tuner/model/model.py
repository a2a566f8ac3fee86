"""BoneModel: PEFT calls it to put adapters of the family into a model, to merge them, and to load them.

`controls` has the methods for users.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from flashbone.errors import ConfigError, ShapeError
from flashbone.files import patterns
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.calls import CURRENT, changes_model, one_call, pass_rows_to_saved_modules
from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.layer import BoneLayer, bone_layers
from flashbone.tuner.layers.mixed_batch import row_names
from flashbone.tuner.layers.parameters import ParamWrapper, check_targets, inside_wrappers
from flashbone.tuner.layers.quantized import keep_trainable
from flashbone.tuner.model import keys, saved_parameters
from flashbone.tuner.model.acting import watch
from flashbone.tuner.model.config import BoneConfig
from flashbone.tuner.model.controls import Controls
from flashbone.tuner.model.loading import check_state_dict, take_back, trained_names
from flashbone.tuner.model.saved_parameters import SavedParameter
from flashbone.tuner.model.targets import (
    TargetError,
    check_host,
    check_order,
    default_targets,
    layer_class,
    nearest_names,
    resolve,
    warn_of_missing,
    why_not,
)
from flashbone.tuner.model.whole import matches, problem_of_name, warn_of_unsaved

REFERENCE = "ref"  # what TRL calls it
_INSIDE = re.compile(r"(\.base_layer)+\.bone_block$")


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Errors of sizes and settings name the layer."""
    try:
        yield
    except (ShapeError, ConfigError) as error:
        raise type(error)(f"{layer}: {error}") from None


def _layers_of(model: nn.Module, adapter_name: str) -> Iterator[BoneLayer]:
    for module in model.modules():
        if isinstance(module, BoneLayer) and adapter_name in module.bone_block:
            yield module


class BoneModel(Controls, BaseTuner):
    """A model with adapters of the Bone family (arXiv 2409.15371); made by `peft.get_peft_model`.

    Args:
        model: The model to adapt, in place.
        config: A `BoneConfig`, or a dict from adapter names to them.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Make the blocks on the meta device, for weights that are loaded next.
    """

    peft_config: dict[str, BoneConfig]
    model: nn.Module
    prefix: str = "bone_"
    tuner_layer_cls: Any = (BoneLayer, SavedParameter)
    _check_target_module_exists: Any = staticmethod(matches)
    target_module_mapping = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(model, "_orig_mod"):  # of torch.compile; its wrapper would be part of every name
            model, compiled = model._orig_mod, model.dynamo_ctx
            model._compiled_call_impl = compiled(model._call_impl)
        super().__init__(model, *args, **kwargs)

    @changes_model
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter into the model; if anything fails, the model is as it was."""
        config = self.peft_config[adapter_name]
        if problem := problem_of_name(self.peft_config, adapter_name):
            self.peft_config.pop(adapter_name)
            raise ConfigError(f"adapter name: got {adapter_name!r}, wanted {problem}")
        warn_of_missing(model, config.modules_to_save)
        trained, asked = trained_names(model), (config.target_modules, config.parameters_to_save)
        try:
            self._inject_layers(model, adapter_name, *args, **kwargs)
            on_meta = bool(kwargs.get("low_cpu_mem_usage", False))
            saved_parameters.add_values(model, config, adapter_name, self.active_adapters, on_meta)
            check_host(model)
        except BaseException as error:  # Ctrl-C, too
            config.target_modules, config.parameters_to_save = asked
            take_back(model, adapter_name, trained)
            self.peft_config.pop(adapter_name, None)
            if isinstance(error, TargetError) or not isinstance(error, NoMatchingPeftModuleError):
                raise
            names = ", ".join(nearest_names(model, asked[0]))
            raise TargetError(f"{error} Linear layers of this model end in: {names}.") from None
        if adapter_name == REFERENCE:
            self._start_as_a_copy(config)
        watch(self, model)

    def _inject_layers(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        asked = config.target_modules
        inside, outside = inside_wrappers(model, config)
        if inside and not outside:  # nothing is left for PEFT, which passes over what is inside adapted modules
            config.target_modules = set() if config.target_parameters else DUMMY_TARGET_MODULES
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if inside:
            config.target_modules = config.target_modules if outside else asked
            self._inject_inside(inside, adapter_name, *args, **kwargs)

    def _start_as_a_copy(self, config: BoneConfig) -> None:
        """Make the adapter "ref" a copy of the adapter that has the same config object, if one has.

        TRL's trainers add a reference to a trained PeftModel in this way and then copy the parameters that have
        ".default." in their name. Names of blocks end in ".default", so the reference would silently be the base.
        """
        sources = [name for name, other in self.peft_config.items() if other is config and name != REFERENCE]
        for _, layer in bone_layers(self.model) if sources else ():
            offloading.stop_offloading(layer.bone_block)
            if sources[0] in layer.bone_block and REFERENCE in layer.bone_block:
                layer.bone_block[REFERENCE].data = layer.bone_block[sources[0]].detach().clone()
                layer.bone_scale[REFERENCE] = layer.bone_scale[sources[0]]
        for saved in saved_parameters.find(self.model) if sources else ():
            if sources[0] in saved.bone_value and REFERENCE in saved.bone_value:
                saved.bone_value[REFERENCE].data = saved.bone_value[sources[0]].detach().clone()

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            names_parameters = bool(peft_config.target_parameters)
            peft_config.target_modules = set() if names_parameters else default_targets(model_config["model_type"])
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if problems := check_targets(model, peft_config.target_parameters or []):
            raise TargetError("; ".join(problems))
        peft_config.target_modules = resolve(model, peft_config)
        keep_trainable(model)
        if not peft_config.inference_mode:
            warn_of_unsaved(model, peft_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        fields = {
            "r": patterns.first(peft_config.rank_pattern, current_key, peft_config.r),
            "init_weights": peft_config.init_weights,
            "variant": peft_config.variant,
            "dropout": peft_config.dropout,
            "mini_r": peft_config.mini_r,
            "use_orthogonal": peft_config.use_orthogonal,
            "orthogonal_eps": peft_config.orthogonal_eps,
        }
        wraps = parameter_name is not None and getattr(target, "parameter_name", None) != parameter_name
        if isinstance(target, BoneLayer) and not wraps:
            with _naming(current_key):
                target.update_layer(adapter_name, **fields)
            return
        base = target
        if isinstance(target, BaseTunerLayer):
            if not isinstance(target, BoneLayer):
                check_order(current_key, target, peft_config.variant)
            base = target.get_base_layer()
        if parameter_name is None and (reason := why_not(base)) is not None:
            raise ConfigError(f"{current_key}: target module cannot be adapted, {reason}")
        with _naming(current_key):
            if parameter_name is None:
                new_module = layer_class(base)(target, adapter_name, **fields, **get_quantization_kwargs(self))
            else:
                new_module = ParamWrapper(target, adapter_name, parameter_name, **fields)
        new_module.keep_original, new_module.caches = self._keeps_originals, self._caches
        new_module.backend = self._backend
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _inject_inside(
        self,
        names: dict[str, str],
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        for name, key in names.items():
            parent, _, child = name.rpartition(".")
            target = self.model.get_submodule(name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(config, adapter_name, target, child, self.model.get_submodule(parent), key)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Blocks are on their device already. PEFT would move the whole layer again, which fails beside blocks on the
        # meta device, and would copy `weight` onto the module that it puts back, which may be a container.
        setattr(parent, child_name, new_module)
        for value in vars(parent).values():
            if isinstance(value, list):  # MaskFormer calls its children out of a list of its own
                value[:] = [new_module if item is child else item for item in value]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key in a file: that of the bare layer, or parameter, also where another adapter is around it."""
        key = keys.without_adapter(keys.plain(key), adapter_name)
        return keys.bare(key) if key.endswith(f".{keys.VALUE}") else _INSIDE.sub(".bone_block", key)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The tensors of this adapter's file, under the names of `keys`.

        Raises:
            ConfigError: an adapter is merged into an embedding, whose table PEFT saves, too.
        """
        if any(isinstance(layer, BoneEmbedding) and layer.merged for layer in _layers_of(model, adapter_name)):
            raise ConfigError(
                f"adapter {adapter_name!r}: an embedding is merged, and the merged table would be saved with the"
                " adapter and count twice; call unmerge_adapter() first"
            )
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return keys.to_file(model, selected, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a checkpoint's keys to the model's, and check every one of them before any tensor is loaded."""
        state_dict = keys.from_file(model, keys.without_copies(state_dict, adapter_name), adapter_name)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, adapter_name, mapped)
        for layer in _layers_of(model, adapter_name):  # what is copied to an offloaded block is lost
            offloading.stop_offloading(layer.bone_block)
        return mapped

    @changes_model
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter, or several, the active ones.

        Raises:
            ConfigError: two of them have a value of their own for one parameter (parameters_to_save), or see
                `check_unmerge`.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        for saved in saved_parameters.find(self.model):
            saved.holder(names)
        self.check_unmerge()  # which PEFT does first
        super().set_adapter(adapter_name if isinstance(adapter_name, str) else names, inference_mode)

    @changes_model
    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        saved_parameters.forget(self.model, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to hand `adapter_names` to the layers: a context around each call of the model, and `generate`."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            # A compiled call keeps nothing, and cannot be counted.
            with nullcontext() if torch.compiler.is_compiling() else one_call(self.gate):
                yield
            return
        if self.training:
            raise ConfigError(
                "adapter_names: the model is in training mode, where checkpointing would run rows again without their"
                " names; call model.eval() first"
            )
        if saved := saved_parameters.find(self.model):
            raise ConfigError(
                f"adapter_names: an adapter of this model trains {saved[0].name} whole (parameters_to_save), and it has"
                " one value for all rows of a batch; delete that adapter, or run one batch for each, with set_adapter"
            )
        with one_call(self.gate):  # first, so that what is named cannot be deleted before it is called
            pass_rows_to_saved_modules(self.model)
            CURRENT.rows = row_names(adapter_names, list(self.peft_config), kwargs, self.model)
            yield
