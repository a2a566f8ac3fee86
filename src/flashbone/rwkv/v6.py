"""RWKV-6 (x060): the two halves of a block, under the names of BlinkDL's files, and the model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from flashbone.ops.autocast import without_autocast
from flashbone.rwkv import kernels, wkv6
from flashbone.rwkv.config import Rwkv6Config
from flashbone.rwkv.layers import HeadNorm, RwkvHalf, TimeMix, linear, matrix, ramp_, read, vector
from flashbone.rwkv.model import RwkvForCausalLM
from flashbone.rwkv.shift import Padding, token_shift

Hidden = Float[Tensor, "batch tokens hidden"]
_MIXES = ("w", "k", "v", "r", "g")  # in the order of time_maa_w2


class TimeMix6(TimeMix):
    """What the tokens before say, by a state of each head."""

    time_maa_x: Tensor

    def __init__(self, config: Rwkv6Config, layer: int) -> None:
        super().__init__()
        self.config = config
        hidden, rank = config.hidden_size, config.mix_rank
        for name in ("x", *_MIXES):
            setattr(self, f"time_maa_{name}", vector(hidden))
        self.time_maa_w1, self.time_maa_w2 = matrix(hidden, 5 * rank), matrix(5, rank, hidden)
        self.time_decay = vector(hidden)
        self.time_decay_w1, self.time_decay_w2 = matrix(hidden, config.decay_rank), matrix(config.decay_rank, hidden)
        self.time_faaaa = matrix(config.num_heads, config.head_size)
        self.receptance, self.key, self.value, self.output, self.gate = (linear(hidden, hidden) for _ in range(5))
        self.ln_x = HeadNorm(config.num_heads, hidden, eps=config.head_norm_eps)
        if config.has_time_state:
            self.add_time_state()

    def forward(
        self, x: Hidden, first_value: Hidden, before: Tensor, state: Tensor, padding: Padding | None
    ) -> tuple[Hidden, Hidden, Tensor, Tensor]:
        """The output, `first_value` as it came, and the new memory: the last token and the state."""
        previous, last = token_shift(x, before, padding)
        step = previous - x
        inner = torch.tanh((x + step * read(self.time_maa_x)) @ read(self.time_maa_w1)).unflatten(-1, (5, -1))
        shares = torch.einsum("btir,irc->ibtc", inner, read(self.time_maa_w2))
        x_w, x_k, x_v, x_r, x_g = (
            x + step * (read(getattr(self, f"time_maa_{name}")) + share)
            for name, share in zip(_MIXES, shares.unbind(0), strict=True)
        )
        decay = read(self.time_decay) + torch.tanh(x_w @ read(self.time_decay_w1)) @ read(self.time_decay_w2)
        log_w, r, k, v = -torch.exp(decay.to(state.dtype)), self.receptance(x_r), self.key(x_k), self.value(x_v)
        if padding is not None:  # such a column leaves the state as it is
            log_w, k = log_w * padding.is_token, k * padding.is_token
        r, log_w, k, v = (y.unflatten(-1, (-1, self.config.head_size)) for y in (r, log_w, k, v))
        u = read(self.time_faaaa).to(r.dtype)
        with without_autocast(x.device.type):
            y, state = kernels.run(wkv6, self.config.wkv_backend, r, log_w, k, v, u, state)
        y = self.ln_x(y.flatten(2)).to(x.dtype) * functional.silu(self.gate(x_g))
        return self.output(y), first_value, last, state

    def init_weights(self) -> None:
        """A random start that behaves: half of each mix, decays from slow to fast."""
        for name in ("x", *_MIXES):
            nn.init.constant_(getattr(self, f"time_maa_{name}"), 0.5)
        ramp_(self.time_decay, -6.0, -1.0)
        ramp_(self.time_faaaa, 0.0, 1.0)
        for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
            nn.init.normal_(getattr(self, name), std=self.config.initializer_range)


class ChannelMix6(RwkvHalf):
    """The block's MLP, gated by the receptance."""

    def __init__(self, config: Rwkv6Config, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.time_maa_k, self.time_maa_r = vector(hidden), vector(hidden)
        self.key, self.value = linear(hidden, config.intermediate_size), linear(config.intermediate_size, hidden)
        self.receptance = linear(hidden, hidden)

    def forward(self, x: Hidden, before: Tensor, padding: Padding | None) -> tuple[Hidden, Tensor]:
        """The output, and the last token."""
        previous, last = token_shift(x, before, padding)
        step = previous - x
        mixed = self.value(torch.relu(self.key(x + step * read(self.time_maa_k))) ** 2)
        return torch.sigmoid(self.receptance(x + step * read(self.time_maa_r))) * mixed, last

    def init_weights(self) -> None:
        """As `TimeMix6.init_weights`."""
        nn.init.constant_(self.time_maa_k, 0.5)
        nn.init.constant_(self.time_maa_r, 0.5)


class Rwkv6ForCausalLM(RwkvForCausalLM):
    """RWKV-6 ("Finch", x060) with its head."""

    config_class = Rwkv6Config
    halves = TimeMix6, ChannelMix6
