"""Which layers get an adapter, and of which class; roles and containers in `target_modules` become names for PEFT."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper, match_target_against_key
from torch import nn
from transformers import PreTrainedModel

from flashbone import variants
from flashbone.errors import ConfigError
from flashbone.files.folders import in_saved_module
from flashbone.files.names import dotted_endings
from flashbone.tuner.layers.conv import CONVOLUTIONS, BoneConv
from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.kinds import with_article
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.tuner.layers.own_forward import BoneOwnForward, has_own_forward
from flashbone.tuner.layers.parameters import ParamWrapper
from flashbone.tuner.layers.quantized import linear_problem, quantized_kind_of
from flashbone.tuner.model.roles import DERIVED, NAMES, ROLES, roles_of_name
from flashbone.tuner.model.weight_reads import mark_read_weights
from flashbone.tuner.model.whole import matches, saved_names

MAX_SUGGESTIONS = 8
_SAVED_BY_PEFT = {"classifier", "score", "qa_outputs"}  # added to every config of such a task
# How adapters of different methods in one layer add up. A LoRA inside a Bone adapter would see the shifted input.
BONE_FIRST = (
    "the BONE adapter first, then the others, with model.add_adapter of transformers or peft.inject_adapter_in_model"
)
_SUPPORTED = "nn.Linear, transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Embedding"
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class TargetError(ConfigError, NoMatchingPeftModuleError):
    """No module of the model matches `target_modules`, or none has a role that it names."""


def layer_class(base: nn.Module) -> type[BoneLinear]:
    """The class of layer that adapts a base layer for which `why_not` returns None."""
    if isinstance(base, CONVOLUTIONS):
        return BoneConv
    if isinstance(base, nn.Embedding):
        return BoneEmbedding
    return BoneOwnForward if has_own_forward(base) else BoneLinear


def why_not(base: nn.Module) -> str | None:
    """Why the family cannot adapt this module, and what to do instead; None if it can."""
    kind = type(base).__name__
    if isinstance(base, (*CONVOLUTIONS, nn.Embedding)) and not isinstance(base, _TRANSPOSED):
        if base.weight.is_floating_point() and not hasattr(base.weight, "tensor_data_names"):
            return None
        return f"it is a quantised {kind}, and of quantised layers only linear ones are supported; leave it out"
    problem = linear_problem(base)
    if problem is None or quantized_kind_of(base) is not None:
        return problem
    it_is = f"it is {with_article(kind)}"
    if isinstance(base, nn.MultiheadAttention):
        fused = "in_proj_weight" if base._qkv_same_embed_dim else "q_proj_weight, k_proj_weight and v_proj_weight"
        return f"{it_is}; name its out_proj instead, and its {fused} in target_parameters"
    if isinstance(base, _TRANSPOSED):
        return f"{it_is}, and of convolutions only those that are not transposed are supported; leave it out"
    if isinstance(base, (nn.RNNBase, nn.RNNCellBase)):
        return f"{it_is}, whose weights no variant is defined for; leave it out"
    if isinstance(base, nn.EmbeddingBag):
        return f"{it_is}, which adds rows up by itself; nn.Embedding is supported; leave it out"
    matrices = [name for name, p in base.named_parameters(recurse=False) if p.ndim in (2, 3)]
    if matrices and not isinstance(base, nn.Bilinear):
        names = ", ".join(matrices)
        return f"{it_is}; its {names} can be named in target_parameters; as layers, {_SUPPORTED} are supported"
    return f"{it_is}, and only {_SUPPORTED} are supported; leave it out"


def check_order(layer: str, inner: nn.Module, variant: str) -> None:
    """Check that a Bone adapter can go around another method's adapter in the same layer.

    Raises:
        ConfigError: the variant shifts the layer's input, so the other adapter would see the shifted one, and the
            output would not be the sum of both.
    """
    kind = variants.get(variant)
    if kind.delta_depends_on_weight and not kind.reads_weight:
        raise ConfigError(
            f"{layer}: its {type(inner).__module__}.{type(inner).__name__} adapter would see the input that {variant}"
            f" shifts, so that the two would not add up; put {BONE_FIRST}"
        )


def check_host(model: nn.Module) -> None:
    """Check that the model computes with its adapted layers as they are; tell layers whose weight it reads so.

    Raises:
        ConfigError: it divides weights in place between calls, or see `mark_read_weights`.
    """
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        divides = hasattr(type(module), "_rescale_layers")  # transformers' RWKV-4
        if divides and 0 < module.config.rescale_every < module.config.num_hidden_layers:
            raise ConfigError(
                f"{kind} divides its weights in place in eval mode, and what an adapter adds would not be divided; load"
                " the model with from_pretrained(..., rescale_every=0), or set that in its config.json"
            )
    mark_read_weights(model)


def _modules(model: nn.Module, opaque: type | tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with their names, without those inside modules of the opaque types."""
    skipped = None
    for name, module in model.named_modules():  # a module comes right before those inside it
        if name and not (skipped and name.startswith(skipped)):
            skipped = f"{name}." if isinstance(module, opaque) else None
            yield name, module


def adaptable_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers that the family can adapt or has adapted, in the model's order; without modules inside
    adapters or inside modules that are trained whole."""
    return [
        name
        for name, module in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if not isinstance(module, ParamWrapper) and linear_problem(_base(module)) is None
    ]


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def nearest_names(model: nn.Module, wanted: Iterable[str] | str | None) -> list[str]:
    """The last parts of the names of adaptable modules, the most similar to the wanted ones first."""
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in adaptable_modules(model)))
    names = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    near = [
        match
        for name in names
        for match in difflib.get_close_matches(name.rpartition(".")[2], endings, n=3, cutoff=0.5)
    ]
    return list(dict.fromkeys([*near, *endings]))[:MAX_SUGGESTIONS]


def roles_of(model: nn.Module) -> dict[str, list[str]]:
    """The roles in this model, derived ones last, each with the names of its layers."""
    roles_by_layer = {name: set(roles_of_name(name)) for name in adaptable_modules(model)}
    parts = {role: {role} for role in NAMES} | {role: set(parts) for role, parts in DERIVED.items()}
    layers = {role: [name for name, roles in roles_by_layer.items() if roles & parts[role]] for role in parts}
    return {role: names for role, names in layers.items() if names}


def default_targets(model_type: str) -> set[str] | str:
    """What `target_modules=None` means: PEFT's table, and "all-linear" for models that it does not know."""
    known = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING.get(model_type)
    return set(known) if isinstance(known, list) else known or "all-linear"


def resolve(model: nn.Module, config: Any) -> set[str] | str:
    """`target_modules` with roles and containers replaced by names of layers.

    An entry is, in this order: the ending of a layer's name, the ending of the name of a module with layers inside, a
    role; PEFT interprets all others. The caller writes the result into the config: PEFT matches modules by this field,
    and saves it, so that a file names layers, which older PEFT can read, too.

    Raises:
        TargetError: the model has no layer with a role, or another field names a role; all of these are named.
    """
    wanted, layers, roles = config.target_modules, adaptable_modules(model), roles_of(model)
    attentions = [name for name, module in model.named_modules() if isinstance(_base(module), nn.MultiheadAttention)]
    _refuse_roles_elsewhere(config, layers, roles)
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            hidden, saved = _linear_of_other_classes(model), saved_names(config)
            by_peft: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
            whole = {name for name in by_peft.target_modules if in_saved_module(f"{name}.weight", saved)}
            return (by_peft.target_modules | hidden) - whole if hidden or whole else wanted
        if wanted not in ROLES or any(match_target_against_key(wanted, name) for name, _ in model.named_modules()):
            return wanted
        wanted = {wanted}
    for_peft, named, expanded, missing = set(), set(), set(), []
    for entry in sorted(wanted or ()):
        if matches := [name for name in layers if f".{name}".endswith(f".{entry}")]:
            for_peft.add(entry)
            named.update(matches)
        elif any(f".{name}".endswith(f".{entry}") for name in attentions):
            for_peft.add(entry)  # refused later: it would mean its out_proj alone
        elif inside := [name for name in layers if f".{entry}." in f".{name}"]:
            expanded.update(inside)
        elif entry in roles:
            expanded.update(roles[entry])
        elif entry in ROLES:
            missing.append(entry)
        else:
            for_peft.add(entry)
    if missing:
        raise TargetError(_missing_roles(model, missing, [role for role in roles if role in NAMES]))
    return for_peft | exact_names(model, config, expanded - named, named) if expanded else for_peft


def warn_of_missing(model: nn.Module, modules_to_save: Iterable[str] | None) -> None:
    """Warn of modules to save that no module's name ends in; PEFT would pass over them."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    missing = [
        entry
        for entry in modules_to_save or ()
        if entry not in _SAVED_BY_PEFT and not any(name.endswith(entry) for name in names)
    ]
    if missing:
        near = [match for entry in missing for match in difflib.get_close_matches(entry, _last_parts(names), n=2)]
        hint = f"; did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
        warnings.warn(f"modules_to_save: this model has no {', '.join(map(repr, missing))}{hint}", stacklevel=3)


def _last_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _linear_of_other_classes(model: nn.Module) -> set[str]:
    """Names of quantised linear layers that are not a `torch.nn.Linear` (HQQ, GPTQ, ...); PEFT would skip them."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name
        for name, module in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if module is not output and not isinstance(module, nn.Linear) and quantized_kind_of(module) is not None
    }


def _refuse_roles_elsewhere(config: Any, layers: list[str], roles: dict[str, list[str]]) -> None:
    """Refuse roles in other fields than `target_modules`, where PEFT would look for modules of that name."""
    fields = {"exclude_modules": config.exclude_modules, "rank_pattern": config.rank_pattern}
    problems = []
    for field, entries in fields.items():
        for entry in sorted([entries] if isinstance(entries, str) else entries or ()):
            if entry in ROLES and not any(f".{name}".endswith(f".{entry}") for name in layers):
                endings = dict.fromkeys(name.rpartition(".")[2] for name in roles.get(entry, []))
                names = f"name its layers, which end in {', '.join(endings)}" if endings else "this model has none"
                problems.append(f"{field}: {entry!r} is a role, which only target_modules takes; {names}")
    if problems:
        raise TargetError("; ".join(problems))


def _missing_roles(model: nn.Module, missing: list[str], present: list[str]) -> str:
    roles = f"role{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"
    names = "it has " + ", ".join(present)
    if not present:
        names = "nor with any other; its linear layers end in: " + ", ".join(nearest_names(model, missing))
    return f"target_modules: this model has no layer with the {roles}; {names}"


def exact_names(model: nn.Module, config: Any, layers: set[str], named: set[str]) -> set[str]:
    """For each layer the shortest ending of its name that matches no module but these and the `named` ones."""
    names = {name for name, _ in model.named_modules() if name}
    open_names = {name for name in names if _is_open(config, name)}
    layers = layers & open_names or layers  # if none is left, PEFT raises
    others = names - layers - named
    taken = others | {ending for name in others & open_names for ending in dotted_endings(name)}
    return {next((ending for ending in dotted_endings(name) if ending not in taken), name) for name in layers}


def _is_open(config: Any, name: str) -> bool:
    """Whether the config's other fields (exclude_modules, modules_to_save, layers_to_transform) allow this module."""
    probe = copy.copy(config)
    probe.target_modules = {name.rpartition(".")[2]}
    return bool(matches(probe, name))


def resolved(model: nn.Module, config: Any) -> list[str]:
    """Names of the modules that a config would adapt, in the model's order. Changes neither; the model may be on the
    meta device.

    Raises:
        ConfigError: the config matches modules that cannot be adapted.
        TargetError: see `resolve`.
    """
    probe = copy.copy(config)
    if probe.target_modules is None and not probe.target_parameters:
        probe.target_modules = default_targets(BaseTuner.get_model_config(model)["model_type"])
    probe.target_modules = resolve(model, probe)
    probe = _maybe_include_all_linear_layers(probe, model)
    matched = {name: module for name, module in _modules(model, BaseTunerLayer) if matches(probe, name)}
    if unfit := {name: reason for name, module in matched.items() if (reason := why_not(_base(module)))}:
        problems = "; ".join(f"{name}: target module cannot be adapted, {reason}" for name, reason in unfit.items())
        raise ConfigError(problems)
    return list(matched)
