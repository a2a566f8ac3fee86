"""Models with layers to be targeted, and the names of those that got an adapter."""

import torch
from peft import BoneConfig, PeftModel
from torch import nn

from flashbone import BoneLayer


def config(*targets: str, **fields) -> BoneConfig:
    return BoneConfig(**{"r": 4, "target_modules": list(targets)} | fields)


def adapted(model: nn.Module) -> list[str]:
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    return [name for name, module in inner.named_modules() if isinstance(module, BoneLayer)]


class Linears(nn.Module):
    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(*size))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Linears(q_proj=(8, 8), k_proj=(8, 8), v_proj=(8, 8), out_proj=(8, 8))
        self.mlp = Linears(gate_proj=(8, 12), up_proj=(8, 12), down_proj=(12, 8))
        self.router = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention, mlp = self.self_attn, self.mlp
        x = attention.out_proj(attention.q_proj(x) * attention.k_proj(x) + attention.v_proj(x))
        return mlp.down_proj(mlp.gate_proj(x).tanh() * mlp.up_proj(x)) * self.router(x).mean()


class Unknown(nn.Module):
    """A model that no table knows, with names as they are usual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query = nn.Linear(8, 8), nn.EmbeddingBag(4, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = Linears(out_proj=(8, 8), down_proj=(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head.down_proj(self.head.out_proj(self.blocks(self.embed(x)) + self.query.weight[0]))
