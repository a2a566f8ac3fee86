"""RWKV-7 (x070): the two halves of a block, under the names of BlinkDL's files, and the model."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from flashbone.ops.autocast import without_autocast
from flashbone.rwkv import kernels, wkv7
from flashbone.rwkv.config import Rwkv7Config
from flashbone.rwkv.layers import HeadNorm, RwkvHalf, TimeMix, linear, matrix, ramp_, read, vector
from flashbone.rwkv.model import RwkvForCausalLM
from flashbone.rwkv.shift import Padding, token_shift

Hidden = Float[Tensor, "batch tokens hidden"]


class TimeMix7(TimeMix):
    """What the tokens before say, by a state of each head."""

    x_r: Tensor
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor
    w0: Tensor
    a0: Tensor
    k_k: Tensor
    k_a: Tensor

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, heads, size = config.hidden_size, config.num_heads, config.head_size
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            setattr(self, name, vector(hidden))
        self.w1, self.w2 = matrix(hidden, config.decay_rank), matrix(config.decay_rank, hidden)
        self.a1, self.a2 = matrix(hidden, config.rate_rank), matrix(config.rate_rank, hidden)
        if layer > 0 or config.has_first_values:
            self.v0 = vector(hidden)
            self.v1, self.v2 = matrix(hidden, config.value_rank), matrix(config.value_rank, hidden)
        self.g1, self.g2 = matrix(hidden, config.gate_rank), matrix(config.gate_rank, hidden)
        self.r_k = matrix(heads, size)
        self.receptance, self.key, self.value, self.output = (linear(hidden, hidden) for _ in range(4))
        self.ln_x = HeadNorm(heads, hidden, eps=config.head_norm_eps)
        if config.has_time_state:
            self.add_time_state()

    def forward(
        self, x: Hidden, first_value: Hidden, before: Tensor, state: Tensor, padding: Padding | None
    ) -> tuple[Hidden, Hidden, Tensor, Tensor]:
        """The output, the first block's value, and the new memory: the last token and the state."""
        previous, last = token_shift(x, before, padding)
        step = previous - x
        r = self.receptance(x + step * read(self.x_r))
        decay = read(self.w0) + torch.tanh((x + step * read(self.x_w)) @ read(self.w1)) @ read(self.w2)
        k = self.key(x + step * read(self.x_k))
        x_v = x + step * read(self.x_v)
        v = self.value(x_v)
        rate = torch.sigmoid(read(self.a0) + (x + step * read(self.x_a)) @ read(self.a1) @ read(self.a2))
        gate = torch.sigmoid((x + step * read(self.x_g)) @ read(self.g1)) @ read(self.g2)
        if self.layer == 0:
            first_value = v
        else:
            v = v + (first_value - v) * torch.sigmoid(read(self.v0) + x_v @ read(self.v1) @ read(self.v2))
        direction = self._by_head(k * read(self.k_k))
        k = self._by_head(k * (1 + (rate - 1) * read(self.k_a)))
        y, state = self._mix(r, decay, k, v, direction, rate, state, padding)
        r, v = self._by_head(r), self._by_head(v)
        own = (r * k * read(self.r_k)).sum(-1, keepdim=True) * v
        y = self.ln_x(y.flatten(2)).to(x.dtype) + own.flatten(2).to(x.dtype)
        return self.output(y * gate), first_value, last, state

    def _mix(
        self,
        r: Tensor,
        decay: Tensor,
        k: Tensor,
        v: Tensor,
        direction: Tensor,
        rate: Tensor,
        state: Tensor,
        padding: Padding | None,
    ) -> tuple[Tensor, Tensor]:
        """The state's own part, in fp32 whatever autocast says; a column of padding leaves the state as it is."""
        wide = state.dtype
        log_w = -math.exp(-0.5) * torch.sigmoid(decay.to(wide))
        kk = functional.normalize(direction.to(wide), dim=-1)
        if padding is not None:
            log_w, v = log_w * padding.is_token, v * padding.is_token
            kk = kk * padding.is_token.unsqueeze(-1)
        r, log_w, v, rate = map(self._by_head, (r, log_w, v, rate))
        a, b = (-kk).to(r.dtype), (kk * rate).to(r.dtype)
        with without_autocast(r.device.type):
            return kernels.run(wkv7, self.config.wkv_backend, r, log_w, k, v, a, b, state)

    def _by_head(self, x: Hidden) -> Float[Tensor, "batch tokens heads N"]:
        return x.unflatten(-1, (-1, self.config.head_size))

    def init_weights(self) -> None:
        """A random start that behaves: half of each mix, decays from slow to fast."""
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            nn.init.constant_(getattr(self, name), 0.5)
        ramp_(self.w0, -6.0, -1.0)
        nn.init.zeros_(self.a0)
        nn.init.constant_(self.k_k, 0.85)
        nn.init.ones_(self.k_a)
        nn.init.zeros_(self.r_k)
        names = ["w1", "w2", "a1", "a2", "g1", "g2"]
        if hasattr(self, "v0"):
            nn.init.ones_(self.v0)
            names += ["v1", "v2"]
        for name in names:
            nn.init.normal_(getattr(self, name), std=0.1 if name == "g2" else self.config.initializer_range)


class ChannelMix7(RwkvHalf):
    """The block's MLP."""

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__()
        self.x_k = vector(config.hidden_size)
        self.key = linear(config.hidden_size, config.intermediate_size)
        self.value = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Hidden, before: Tensor, padding: Padding | None) -> tuple[Hidden, Tensor]:
        """The output, and the last token."""
        previous, last = token_shift(x, before, padding)
        return self.value(torch.relu(self.key(x + (previous - x) * read(self.x_k))) ** 2), last

    def init_weights(self) -> None:
        """As `TimeMix7.init_weights`."""
        nn.init.constant_(self.x_k, 0.5)


class Rwkv7ForCausalLM(RwkvForCausalLM):
    """RWKV-7 ("Goose", x070) with its head."""

    config_class = Rwkv7Config
    halves = TimeMix7, ChannelMix7
