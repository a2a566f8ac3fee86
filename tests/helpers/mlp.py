"""A two-layer model with fixed fp64 weights, importable with any PEFT: what golden files are computed on."""

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """in -> hidden -> out, with names that BONE adapters target: lin0, lin1."""

    def __init__(self, sizes: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(sum(sizes))
        self.lin0, self.lin1 = nn.Linear(*sizes[:2], dtype=dtype), nn.Linear(*sizes[1:], dtype=dtype)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) / 3

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.lin0(x)))


def fill_blocks(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter parameter random non-zero values, the same for every PEFT."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "bone_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) / 4


def results(model: nn.Module, in_features: int) -> dict[str, Tensor]:
    """Input, output, every adapter gradient and every merged weight of an adapted MLP; merges the model."""
    x = torch.randn(3, in_features, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found = {"x": x, "y": y.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found["grad:" + name.removeprefix("base_model.model.")] = parameter.grad
    merged = model.merge_and_unload()
    found |= {f"merged:{n}": p.detach().clone() for n, p in merged.named_parameters() if n.endswith("weight")}
    return found
