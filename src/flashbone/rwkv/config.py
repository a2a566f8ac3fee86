"""Configurations of RWKV-7 and RWKV-6 models, in the sizes of BlinkDL's files."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from flashbone.errors import ConfigError

BACKENDS = ("auto", "torch", "fla")


class RwkvConfig(PreTrainedConfig):
    """What both versions share; make a `Rwkv7Config` or a `Rwkv6Config`.

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

    Raises:
        ConfigError: sizes or a backend that cannot be.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

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
        if hidden_size % head_size:
            raise ConfigError(f"head_size: got {head_size}, which does not divide the hidden size of {hidden_size}")
        if wkv_backend not in BACKENDS:
            raise ConfigError(f"wkv_backend: got {wkv_backend!r}, wanted one of {', '.join(BACKENDS)}")
        if kwargs.get("tie_word_embeddings"):
            raise ConfigError("tie_word_embeddings: got True; an RWKV model has an embedding and a head of its own")
        # An embedding and a head of their own; the tokens of the world vocabulary.
        given = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 24, "pad_token_id": 0} | kwargs
        super().__init__(**given)
        register_models()

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


class Rwkv6Config(RwkvConfig):
    """RWKV-6 ("Finch", x060).

    Args:
        mix_rank: Inner size of each of the five pairs in time_maa_w1 and time_maa_w2.
        decay_rank: Inner size of time_decay_w1 and time_decay_w2.
        **kwargs: As for `RwkvConfig`.
    """

    model_type = "rwkv_x060"

    def __init__(self, mix_rank: int = 32, decay_rank: int = 64, **kwargs: Any) -> None:
        self.mix_rank, self.decay_rank = mix_rank, decay_rank
        super().__init__(**kwargs)

    def _default_intermediate(self) -> int:
        return int(3.5 * self.hidden_size) // 32 * 32


def register_models() -> None:
    """Tell AutoModelForCausalLM about the models.

    Here, when the first configuration is made, since importing models while transformers itself is being imported
    would run in circles; whoever asks for a model by its configuration has made one.
    """
    from transformers import AutoModelForCausalLM

    from flashbone.rwkv.model import Rwkv6ForCausalLM, Rwkv7ForCausalLM

    for model in (Rwkv7ForCausalLM, Rwkv6ForCausalLM):
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
