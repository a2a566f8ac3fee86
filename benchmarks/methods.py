"""The table of methods: how each adapts a module, given r and the number of active adapters.

Read by the parent, which imports neither torch nor peft, and used by the workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Setting

CURRENT, OLD = "current", "peft-0.18.1"


@dataclass(frozen=True)
class Method:
    """How a module is adapted.

    Attributes:
        title: Its name in tables.
        config: Class of peft that holds the configuration; "" leaves the module as it is.
        fields: The configuration's fields for a block size r.
        worker: The environment it runs in: CURRENT, or OLD for PEFT 0.18.1.
        several: Whether several of its adapters can be active at once.
        needs: What its gradients need for each token: the "sum" of a layer's shards, the "input", or "input and inner",
            with what a first factor makes of it.
        merged: "" (adapters beside the base), "merged" (still wrapped) or "unloaded" (the plain base again).
    """

    title: str
    config: str = ""
    fields: Callable[[int], dict[str, Any]] = lambda r: {"r": r}
    worker: str = CURRENT
    several: bool = False
    needs: str = "input"
    merged: str = ""


def _lora(r: int) -> dict[str, Any]:
    # Rank r/2 has as many parameters as a block of r on a square layer.
    return {"r": max(r // 2, 1), "lora_alpha": max(r // 2, 1)}


def _variant(name: str) -> Callable[[int], dict[str, Any]]:
    return lambda r: {"r": r, "variant": name}


_ADAPTING = {
    "frozen": Method("frozen base"),
    "bone": Method("flashbone bone", "BoneConfig", _variant("bone"), several=True, needs="sum"),
    "mini": Method(
        "flashbone mini", "BoneConfig", lambda r: {"r": r, "variant": "mini", "mini_r": r}, several=True, needs="sum"
    ),
    "bat-row": Method("flashbone bat-row", "BoneConfig", _variant("bat-row"), several=True),
    "bat-col": Method("flashbone bat-col", "BoneConfig", _variant("bat-col"), several=True),
    "orthogonal": Method("flashbone orthogonal", "BoneConfig", lambda r: {"bottleneck_size": r}, several=True),
    "lora": Method("PEFT LoRA", "LoraConfig", _lora, several=True, needs="input and inner"),
    "dora": Method("PEFT DoRA", "LoraConfig", lambda r: {**_lora(r), "use_dora": True}, needs="input and inner"),
    "oft": Method("PEFT OFT", "OFTConfig", lambda r: {"oft_block_size": r}),
    "miss": Method("PEFT MiSS", "MissConfig", needs="sum"),
    "miss-bat": Method("PEFT MiSS bat", "MissConfig", lambda r: {"r": r, "init_weights": "bat"}),
    "peft-bone": Method("PEFT 0.18.1 Bone", "BoneConfig", lambda r: {"r": r, "init_weights": True}, OLD, needs="sum"),
    "peft-bat": Method("PEFT 0.18.1 Bone bat", "BoneConfig", lambda r: {"r": r, "init_weights": "bat"}, worker=OLD),
    "bone-merged": Method("flashbone bone, merged", "BoneConfig", _variant("bone"), merged="merged"),
    "bone-unloaded": Method("flashbone bone, unloaded", "BoneConfig", _variant("bone"), merged="unloaded"),
    "orthogonal-merged": Method(
        "flashbone orthogonal, merged", "BoneConfig", lambda r: {"bottleneck_size": r}, merged="merged"
    ),
    "orthogonal-unloaded": Method(
        "flashbone orthogonal, unloaded", "BoneConfig", lambda r: {"bottleneck_size": r}, merged="unloaded"
    ),
}
TRAINED = tuple(name for name, method in _ADAPTING.items() if not method.merged)
# No adapters: two ways to compute RWKV's time mixing.
METHODS = {**_ADAPTING, "wkv-chunked": Method("in chunks"), "wkv-loop": Method("loop over tokens")}


def load_hosts(worker: str) -> None:
    """Import what the methods of a worker need."""
    if worker == CURRENT:
        import flashbone  # noqa: F401  (gives peft its BoneConfig)
    import peft
    import transformers  # noqa: F401

    if worker == OLD and peft.__version__ != "0.18.1":
        raise RuntimeError(f"got peft {peft.__version__} beside the environment, wanted 0.18.1")


def adapted(module: Any, setting: Setting, targets: list[str]) -> Any:
    """The module with the adapters of a setting, all of them active and trainable, filled with small random values.

    Args:
        module: It is changed in place and belongs to the result.
        targets: Names (suffixes) of the modules to adapt.

    Returns:
        A PeftModel; the bare module for a method that adds nothing or unloads.
    """
    method = METHODS[setting.method]
    if not method.config:
        return module.requires_grad_(False)
    import peft

    config = getattr(peft, method.config)
    names = ["default", *(f"more{i}" for i in range(1, setting.adapters))]
    configs = [config(target_modules=list(targets), **method.fields(setting.r)) for _ in names]
    model = peft.get_peft_model(module, configs[0])
    for name, other in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, other)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    _fill(model)
    if method.merged == "merged":
        model.merge_adapter()
    return model.merge_and_unload() if method.merged == "unloaded" else model


def _fill(model: Any) -> None:
    """Fill the trainable parameters with small values: a start at zero could hide cost."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # DoRA's magnitudes are norms of the base's rows, not differences from it.
            if parameter.requires_grad and "magnitude" not in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.01
                parameter.copy_(values)
