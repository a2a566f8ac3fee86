"""A live adapter as a LoRA of PEFT: exact for bone and mini, the best of a rank for the others."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from flashbone.errors import ConfigError, NonFiniteError
from flashbone.files import cards
from flashbone.files import lora as lora_files
from flashbone.files.formats import AdapterCard
from flashbone.tuner.layers import offloading
from flashbone.tuner.layers.embedding import BoneEmbedding
from flashbone.tuner.layers.layer import BoneLinear, bone_layers
from flashbone.tuner.model.card import CARD, about_base, has_lora
from flashbone.tuner.model.keys import BLOCK, BLOCK_OF_TRANSPOSED
from flashbone.tuner.model.targets import exact_names
from flashbone.variants import lowrank
from flashbone.variants.lowrank import Factors

_BIAS: dict[str, Any] = {"none": "none", "all": "all", "bone_only": "lora_only"}
_WRAPPED = re.compile(r"\.(original_module|modules_to_save)\.")


@torch.no_grad()
def to_lora(
    model: BaseTuner, adapter_name: str, rank: int | None, error: float | None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """See `BoneModel.to_lora`."""
    if adapter_name not in model.peft_config:
        raise ConfigError(f"to_lora: no adapter {adapter_name!r} in this model, which has {list(model.peft_config)}")
    lowrank.check_size(rank, error)
    layers = {name: layer for name, layer in bone_layers(model.model) if adapter_name in layer.bone_block}
    if not layers:
        raise ConfigError(f"to_lora: no layer of this model has the adapter {adapter_name!r}; was it unloaded?")
    if unfit := {n: layer for n, layer in layers.items() if not has_lora(layer)}:
        kinds = ", ".join(f"{name} ({type(layer).__name__})" for name, layer in unfit.items())
        raise ConfigError(f"to_lora: a plain LoRA has no place for {kinds}; merge the adapter instead")
    config: Any = model.peft_config[adapter_name]
    if config.parameters_to_save:
        names = ", ".join(config.parameters_to_save)
        raise ConfigError(
            f"to_lora: a plain LoRA has no place for {names} (parameters_to_save); merge the adapter instead"
        )
    state = _kept_whole(model, adapter_name)
    factored = {name: _factored(name, layer, adapter_name, rank, error) for name, layer in layers.items()}
    common_rank = max([rank or 1, *(factors.used for factors in factored.values())])
    for name, factors in factored.items():
        key = f"base_model.model.{_bare_name(name)}"
        A, B = lowrank.pad(factors.A, factors.B, common_rank)
        parts = ("embedding_A", "embedding_B") if isinstance(layers[name], BoneEmbedding) else ("A.weight", "B.weight")
        state |= {f"{key}.lora_{parts[0]}": A, f"{key}.lora_{parts[1]}": B}
    conv1d = [name for name, layer in layers.items() if isinstance(layer.get_base_layer(), Conv1D)]
    lora = LoraConfig(
        r=common_rank,
        lora_alpha=common_rank,
        target_modules=[_bare_name(name) for name in layers],
        fan_in_fan_out=len(conv1d) * 2 > len(layers),
        bias=_BIAS[config.bias],
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    lora.target_modules = exact_names(model.model, lora, set(layers), set())  # pyright: ignore[reportAttributeAccessIssue]
    return lora, state


def save_as_lora(model: BaseTuner, path: str | Path, adapter_name: str, rank: int | None, error: float | None) -> None:
    """See `BoneModel.save_as_lora`."""
    config, state = to_lora(model, adapter_name, rank, error)
    whole = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lora.", suffix=".partial", dir=folder) as staging:
        new = Path(staging)
        save_file(whole, new / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if (folder / CARD).exists():
            (new / CARD).write_bytes((folder / CARD).read_bytes())
        cards.put(_card(model, config, state), new / CARD)
        config.save_pretrained(staging)
        for name in (
            SAFETENSORS_WEIGHTS_NAME,
            CARD,
            CONFIG_NAME,
        ):  # the config last, as it makes an adapter
            os.replace(new / name, folder / name)


def _card(model: BaseTuner, config: LoraConfig, state: dict[str, Tensor]) -> AdapterCard:
    """The card of a LoRA."""
    base = config.base_model_name_or_path or getattr(model.model, "name_or_path", None) or None
    parts = (re.match(r"base_model\.model\.(.+)\.lora_\w+", key) for key in state)
    return AdapterCard(
        lora_files.FORMAT,
        None,
        (config.r,),
        tuple({part[1]: None for part in parts if part}),
        base,
        linear_only=all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state),
        task_type=config.task_type,
        **about_base(model.model),
    )


def _bare_name(name: str) -> str:
    """The layer's name in the bare model, also inside another method's adapter."""
    return re.sub(r"(\.base_layer)+$", "", name)


def _kept_whole(model: BaseTuner, adapter_name: str) -> dict[str, Tensor]:
    """Biases, modules to save and resized embeddings, under their names in PEFT's files."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    blocks = (f".{BLOCK}", f".{BLOCK_OF_TRANSPOSED}")
    return {
        f"base_model.{key}" if key.startswith("model.") else key: tensor
        for key, tensor in saved.items()
        if not key.endswith(blocks) and not _WRAPPED.search(key)
    }


def _factored(name: str, layer: BoneLinear, adapter_name: str, rank: int | None, error: float | None) -> Factors:
    base = layer.get_base_layer()
    with offloading.whole(base), offloading.whole(layer.bone_block):
        block = layer.bone_block[adapter_name].detach().clone()
        variant, scale = layer.bone_variant[adapter_name], layer.bone_scale[adapter_name]
        sizes = layer.out_features, layer.in_features
        try:
            return lowrank.factored(variant, block, sizes, layer.pristine_weight, rank, error, scale)
        except (ConfigError, NonFiniteError) as problem:
            raise type(problem)(f"{name}: {problem}") from None
