"""Configurations of RWKV-7 and RWKV-6 models, in the sizes of BlinkDL's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

from flashbone.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from typing_extensions import Self

BACKENDS = ("auto", "torch", "fla")


class Sizes:
    """Reads sizes off shapes, with one error where there are none."""

    def __init__(self, where: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self.where, self.shapes = where, shapes

    def __call__(self, name: str, axis: int, axes: int, default: int | None = None) -> int:
        if name not in self.shapes and default is not None:
            return default
        shape = self.shapes.get(name)
        if shape is None or len(shape) != axes or 0 in shape:
            got = "is missing" if shape is None else f"has shape {shape}, wanted {axes} axes"
            raise FormatError(f"{self.where}: {name} {got}; is the file whole?")
        return shape[axis]

    def common(self, head_size: int) -> dict[str, Any]:
        """What both versions have, as arguments of a configuration."""
        hidden = self("emb.weight", 1, 2)
        if hidden % head_size:
            raise FormatError(f"{self.where}: heads of {head_size} do not divide the width {hidden} of emb.weight")
        parts = [name.split(".") for name in self.shapes if name.startswith("blocks.")]
        numbers = {int(part[1]) for part in parts if part[1].isdecimal()}  # others are unknown names
        gap = next(i for i in range(len(numbers) + 1) if i not in numbers)
        if gap < len(numbers):
            raise FormatError(f"{self.where}: has blocks.{max(numbers)}, but no blocks.{gap}; is the file whole?")
        return {
            "vocab_size": self("emb.weight", 0, 2),
            "hidden_size": hidden,
            "num_hidden_layers": len(numbers),
            "intermediate_size": self("blocks.0.ffn.key.weight", 0, 2),
            "head_size": head_size,
            "has_time_state": "blocks.0.att.time_state" in self.shapes,
        }


class RwkvConfig(PreTrainedConfig):
    """What all versions share; make a `Rwkv7Config` or a `Rwkv6Config`.

    Args:
        vocab_size: Rows of the embedding; 65536 in the world models.
        hidden_size: Features of the residual stream, `n_embd`.
        num_hidden_layers: Blocks.
        intermediate_size: Features between ffn.key and ffn.value. None: 4 (v7) or 3.5 times the hidden size (v6).
        head_size: Features of a head, `N`; it divides the hidden size.
        layer_norm_eps: Of all LayerNorms.
        head_norm_eps: Of ln_x, which normalises what each head returns.
        initializer_range: Standard deviation of new random weights.
        wkv_backend: Who runs the time mixing: "torch", "fla" (flash-linear-attention's kernels, which need a GPU), or
            "auto": those where they are installed and give our results on this GPU, else torch.
        use_cache: Whether a call returns the recurrent state.
        has_time_state: Whether each block holds `time_state`, from which sequences start (state tuning).

    Raises:
        ConfigError: sizes or a backend that cannot be.
    """

    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    title: ClassVar[str]  # of the version
    mark: ClassVar[str]  # a tensor of the first block that no other version has
    when_made: ClassVar[list[Callable[[], None]]] = []  # called for each configuration

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        intermediate_size: int | None = None,
        head_size: int = 64,
        layer_norm_eps: float = 1e-5,
        head_norm_eps: float = 64e-5,
        initializer_range: float = 0.02,
        wkv_backend: str = "auto",
        use_cache: bool = True,
        has_time_state: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = self._default_intermediate() if intermediate_size is None else intermediate_size
        self.head_size = head_size
        self.layer_norm_eps = layer_norm_eps
        self.head_norm_eps = head_norm_eps
        self.initializer_range = initializer_range
        self.wkv_backend = wkv_backend
        self.use_cache = use_cache
        self.has_time_state = has_time_state
        if hidden_size % head_size:
            raise ConfigError(f"head_size: got {head_size}, which does not divide the hidden size of {hidden_size}")
        if wkv_backend not in BACKENDS:
            raise ConfigError(f"wkv_backend: got {wkv_backend!r}, wanted one of {', '.join(BACKENDS)}")
        if kwargs.get("tie_word_embeddings"):
            raise ConfigError("tie_word_embeddings: got True; an RWKV model has an embedding and a head of its own")
        # The tokens of the world vocabulary.
        fields = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 24, "pad_token_id": 0} | kwargs
        super().__init__(**fields)
        for call in self.when_made:
            call()

    @classmethod
    def from_shapes(cls, size: Sizes) -> Self:
        """The configuration of the model in a file, from its tensors' shapes."""
        raise NotImplementedError

    def _default_intermediate(self) -> int:
        return 4 * self.hidden_size

    @property
    def num_heads(self) -> int:
        """Heads of the time mixing, `H`."""
        return self.hidden_size // self.head_size


class Rwkv7Config(RwkvConfig):
    """RWKV-7 ("Goose", x070).

    Args:
        decay_rank, rate_rank, value_rank, gate_rank: Inner sizes of the pairs w1 w2, a1 a2, v1 v2 and g1 g2.
        has_first_values: Whether the first block holds v0, v1 and v2, which it does not use; released files do.
        **kwargs: As for `RwkvConfig`.
    """

    model_type = "rwkv_x070"
    title, mark = "RWKV-7", "blocks.0.att.r_k"

    def __init__(
        self,
        decay_rank: int = 64,
        rate_rank: int = 64,
        value_rank: int = 32,
        gate_rank: int = 128,
        has_first_values: bool = True,
        **kwargs: Any,
    ) -> None:
        self.decay_rank, self.rate_rank = decay_rank, rate_rank
        self.value_rank, self.gate_rank = value_rank, gate_rank
        self.has_first_values = has_first_values
        super().__init__(**kwargs)

    @classmethod
    def from_shapes(cls, size: Sizes) -> Self:
        return cls(
            **size.common(size("blocks.0.att.r_k", 1, 2)),
            decay_rank=size("blocks.0.att.w1", 1, 2),
            rate_rank=size("blocks.0.att.a1", 1, 2),
            value_rank=size("blocks.1.att.v1" if "blocks.1.att.v1" in size.shapes else "blocks.0.att.v1", 1, 2, 1),
            gate_rank=size("blocks.0.att.g1", 1, 2),
            has_first_values="blocks.0.att.v0" in size.shapes,
        )


class Rwkv6Config(RwkvConfig):
    """RWKV-6 ("Finch", x060).

    Args:
        mix_rank: Inner size of each of the five pairs in time_maa_w1 and time_maa_w2.
        decay_rank: Inner size of time_decay_w1 and time_decay_w2.
        **kwargs: As for `RwkvConfig`.
    """

    model_type = "rwkv_x060"
    title, mark = "RWKV-6", "blocks.0.att.time_maa_x"

    def __init__(self, mix_rank: int = 32, decay_rank: int = 64, **kwargs: Any) -> None:
        self.mix_rank, self.decay_rank = mix_rank, decay_rank
        super().__init__(**kwargs)

    @classmethod
    def from_shapes(cls, size: Sizes) -> Self:
        return cls(
            **size.common(size("blocks.0.att.time_faaaa", 1, 2)),
            mix_rank=size("blocks.0.att.time_maa_w2", 1, 3),
            decay_rank=size("blocks.0.att.time_decay_w1", 1, 2),
        )

    def _default_intermediate(self) -> int:
        return int(3.5 * self.hidden_size) // 32 * 32


CONFIGS: tuple[type[RwkvConfig], ...] = (Rwkv7Config, Rwkv6Config)
