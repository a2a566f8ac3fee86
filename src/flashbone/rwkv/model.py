"""What RWKV's versions share as language models of transformers.

Names of parameters are those of BlinkDL's `.pth` files, with nothing before them, so that files of models and of
adapters need no renaming. So the backbone is not a module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from flashbone.errors import ConfigError
from flashbone.rwkv.config import RwkvConfig
from flashbone.rwkv.layers import Norm, linear
from flashbone.rwkv.shift import Padding, padding_of
from flashbone.rwkv.state import LayerState, RwkvState, given_layers
from flashbone.rwkv.writing import Shapes, write_pth


class RwkvBlock(GradientCheckpointingLayer):
    """One layer: time mixing, then channel mixing, each on a normalised copy."""

    def __init__(self, config: RwkvConfig, layer: int, time_mix: Any, channel_mix: Any) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = Norm(config.hidden_size, config.layer_norm_eps)
        self.ln1 = Norm(config.hidden_size, config.layer_norm_eps)
        self.ln2 = Norm(config.hidden_size, config.layer_norm_eps)
        self.att = time_mix(config, layer)
        self.ffn = channel_mix(config, layer)

    def forward(
        self, x: Tensor, first_value: Tensor, att: Tensor, wkv: Tensor, ffn: Tensor, padding: Padding | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The stream after this block, the first block's value, and the fields of the new `LayerState`: all tensors by
        themselves, since reentrant checkpointing sees no others."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, first_value, att, wkv = self.att(self.ln1(x), first_value, att, wkv, padding)
        x = x + y
        y, ffn = self.ffn(self.ln2(x), ffn, padding)
        return x + y, first_value, att, wkv, ffn


class _Backbone:
    """A model without its head, for callers that take the head on themselves, as TRL does."""

    def __init__(self, model: RwkvForCausalLM) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._model.backbone(*args, **kwargs)


class RwkvForCausalLM(PreTrainedModel, GenerationMixin):
    """What all versions share; `v7` and `v6` have the models.

    Attributes:
        halves: Classes of the time mixing and the channel mixing.
        chunk_ctx: In training, sequences run through the model in pieces of so many tokens, which hand the state on,
            and only one piece's activations are in memory at a time; gradients are those of the whole sequence. None:
            in one piece.
        carries_gradient: With `chunk_ctx`, whether gradients go through the state from one piece to those before it.
    """

    config_class = RwkvConfig
    config: RwkvConfig
    halves: tuple[type, type]
    _no_split_modules = ["RwkvBlock"]
    supports_gradient_checkpointing = True
    _is_stateful = True
    accepts_loss_kwargs = True
    chunk_ctx: int | None = None
    carries_gradient: bool = True

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(RwkvBlock(config, layer, *self.halves) for layer in range(config.num_hidden_layers))
        self.ln_out = Norm(config.hidden_size, config.layer_norm_eps)
        self.head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @property
    def base_model(self) -> Any:
        """The model without its head; a function, no module."""
        return _Backbone(self)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # calls make their state themselves

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            cast(Any, module).init_weights()
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RwkvState | None = None,
        inputs_embeds: Float[Tensor, "batch tokens hidden"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        cache: RwkvState | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Predict the next tokens.

        Args:
            input_ids: Tokens, or `inputs_embeds` instead.
            attention_mask: (batch, tokens) or, with a state, also over the tokens before; zeros are padding, wherever.
                What is returned for a column of padding is that of the token before it.
            past_key_values: The state that an earlier call returned; it is replaced in place.
            labels: Tokens to predict, which the loss shifts; -100 is not learned.
            use_cache: Whether to return the state (default: as the config says, and not in training).
            output_hidden_states: Whether to return the stream before each block, and what the head sees.
            return_dict: False gives a tuple.
            logits_to_keep: How many of the last columns, or which, get logits; 0 is all.
            position_ids: Ignored, but for packed sequences.
            cache: `past_key_values`, as transformers 5.24 and newer call it.

        Raises:
            ConfigError: several sequences are packed into one row, through which the state would run; or
                `past_key_values` is the cache of other models; or it is given by both names.
            ShapeError: the mask or the state is of another batch.
        """
        refuse_packing(position_ids, attention_mask, kwargs)
        out = self.backbone(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states, cache=cache
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        assert out.last_hidden_state is not None
        logits = self.head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cast(Any, out.past_key_values), hidden_states=out.hidden_states
        )
        return result.to_tuple() if return_dict is False else result

    def backbone(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RwkvState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        cache: RwkvState | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """What the head sees, (batch, tokens, hidden): the model without its head, whose arguments are `forward`'s."""
        refuse_packing(position_ids, attention_mask, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give either input_ids or inputs_embeds")
        if past_key_values is not None and cache is not None:
            raise ConfigError("past_key_values and cache are two names of one state; give it by one of them")
        x = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        padding = padding_of(attention_mask, *x.shape[:2])
        state = past_key_values if cache is None else cache
        layers = given_layers(state, x) or self._empty_state(x)
        streams: list[Tensor] | None = [] if output_hidden_states else None
        if self.training and self.chunk_ctx and x.shape[1] > self.chunk_ctx and streams is None:
            x, layers = self._run_in_pieces(x, layers, padding)
        else:
            x, layers = self._run_blocks(x, layers, padding, streams)
        x = self.ln_out(x)
        if padding is not None:  # of a row that ends in padding, generate reads the last column
            x = padding.to(x.device).repeat_tokens(x)
        caches = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if state is not None or caches:
            state = RwkvState() if state is None else state
            state.layers, state.tokens_seen = layers, state.tokens_seen + x.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cast(Any, state),
            hidden_states=None if streams is None else cast(Any, (*streams, x)),
        )

    def _run_blocks(
        self, x: Tensor, layers: list[LayerState], padding: Padding | None, streams: list[Tensor] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        first_value, new = x, []
        for block, memory in zip(self.blocks, layers, strict=True):
            if streams is not None:
                streams.append(x)
            x, first_value, *memory = block(x, first_value, *memory, padding)
            new.append(LayerState(*memory))
        return x, new

    def _run_in_pieces(
        self, x: Tensor, layers: list[LayerState], padding: Padding | None
    ) -> tuple[Tensor, list[LayerState]]:
        """As `_run_blocks`; backward runs each piece again, the last one first."""
        assert self.chunk_ctx is not None
        outputs = []
        for start in range(0, x.shape[1], self.chunk_ctx):
            piece = x[:, start : start + self.chunk_ctx]
            mask = None if padding is None else padding.columns(start, start + piece.shape[1])
            y, layers = checkpoint(self._run_blocks, piece, layers, mask, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
            if not self.carries_gradient:
                layers = [memory.to_each(torch.Tensor.detach) for memory in layers]
            outputs.append(y)
        return torch.cat(outputs, dim=1), layers

    def _empty_state(self, x: Tensor) -> list[LayerState]:
        batch, config = x.shape[0], self.config
        token = x.new_zeros(batch, config.hidden_size)
        wide = torch.promote_types(x.dtype, torch.float32)
        wkv = x.new_zeros(batch, config.num_heads, config.head_size, config.head_size, dtype=wide)
        return [LayerState(token, cast(Any, block).att.start(wkv), token) for block in self.blocks]

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` calls the model with.

        Raises:
            ConfigError: the tokens that the given state has seen are not among those given; transformers would
                silently leave out as many of them.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ConfigError(
                "generate: past_key_values has seen as many tokens as were given, or more, so that none are new; give"
                " all tokens from the beginning, or new ones with an attention_mask over all"
            )
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    @classmethod
    def expected_shapes(cls, config: RwkvConfig) -> Shapes:
        """Name and shape of every tensor of a model, in the order of a file."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}

    def to_pth(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model as one `.pth` file, which BlinkDL's programs read; see `flashbone.rwkv.to_pth`."""
        write_pth(self.state_dict(), self.expected_shapes(self.config), Path(path), dtype)


def refuse_packing(position_ids: Tensor | None, attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    """Raise ConfigError where several sequences lie in one row, as packed batches without padding have them."""
    packed = any(others.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens", "seq_idx"))
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] > 1:
        starts = position_ids[:, 1:] == 0
        if attention_mask is not None:  # the first token after padding, and padding itself, may have the position 0
            is_token = attention_mask[:, -position_ids.shape[1] :].bool()
            starts = starts & is_token[:, 1:] & is_token[:, :-1]
        packed |= bool(starts.any())
    if packed:
        raise ConfigError(
            "several sequences are packed into one row, and the state would run from one into the next; leave"
            " padding_free and packing out, or pack with packing_strategy: wrapped"
        )
