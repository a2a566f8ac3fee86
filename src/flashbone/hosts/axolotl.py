"""A plugin of axolotl, in its YAML file:

plugins: [flashbone.hosts.axolotl.BonePlugin]
adapter: bone
lora_r: 64                  # r; the other lora_* options mean what they mean for LoRA
bone: {variant: bat-row}    # any more fields of BoneConfig
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from axolotl.loaders import adapter as loaders  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from flashbone import BoneConfig


class BoneArgs(BaseModel):
    """What the plugin adds to axolotl's options."""

    bone: dict[str, Any] | None = None


class BonePlugin(BasePlugin):
    """`adapter: bone`."""

    def get_input_args(self) -> str:
        return f"{__name__}.{BoneArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="bone", lora_like=True)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """The model with a Bone adapter, new or of `lora_model_dir`; None for other adapters."""
        if cfg.adapter != "bone":
            return None
        targets = list(cfg.lora_target_modules or [])
        targets += loaders.find_all_linear_names(model) if cfg.lora_target_linear else []
        config = BoneConfig(
            r=cfg.lora_r,
            target_modules=sorted(set(targets)) or None,
            modules_to_save=cfg.lora_modules_to_save or None,
            dropout=cfg.lora_dropout or 0.0,
            layers_to_transform=cfg.peft_layers_to_transform,
            task_type=loaders._get_peft_task_type(model),
            **(cfg.bone or {}),
        )
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return loaders.PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return loaders.get_peft_model(model, config), config
