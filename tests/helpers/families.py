"""A tiny random model of each family, and the layers that hold each role in it, as one reads them off the model."""

from __future__ import annotations

from dataclasses import dataclass

import transformers as hf
from torch import nn

TOKENS = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
TEXT = TOKENS | LAYERS | {"max_position_embeddings": 16}
EMBEDDED = TEXT | {"embedding_size": 6}
GROUPED = TEXT | {"num_key_value_heads": 1}
SHAPED = GROUPED | {"head_dim": 4}
IMAGE = LAYERS | {"image_size": 8, "patch_size": 4}
DISTILBERT = TOKENS | {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16}
DEBERTA = TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
MODERNBERT = TEXT | {"cls_token_id": 1, "sep_token_id": 2}
GPT2 = TOKENS | {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
MPT = TOKENS | {"d_model": 8, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}
OPT = TOKENS | {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 12}
OPT |= {"max_position_embeddings": 16, "word_embed_proj_dim": 6}
BLOOM = TOKENS | {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
GATED = T5 | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
BART = TOKENS | {"d_model": 8, "max_position_embeddings": 16, "decoder_start_token_id": 1}
BART |= {"encoder_layers": 2, "encoder_ffn_dim": 12, "encoder_attention_heads": 2}
BART |= {"decoder_layers": 2, "decoder_ffn_dim": 12, "decoder_attention_heads": 2}
WHISPER = BART | {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
WAV2VEC2 = TOKENS | LAYERS | {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
WAV2VEC2 |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
DEEPSEEK = GROUPED | {"num_key_value_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4}
DEEPSEEK |= {"qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 2, "head_dim": 4}
RWKV = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "context_length": 16}
RWKV |= {"rescale_every": 0}

# One row of layers: query, key, value, output of the attention, then up, gate, down of the MLP; - where there is none.
BERT = "attention.self.query attention.self.key attention.self.value attention.output.dense"
BERT_MLP = "intermediate.dense - output.dense"
NEOX_MLP = "mlp.dense_h_to_4h - mlp.dense_4h_to_h"
SELF = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GLU = "mlp.up_proj mlp.gate_proj mlp.down_proj"
VIT = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 - mlp.fc2"
IS_OLD = not hasattr(hf, "Qwen3_5TextConfig")  # transformers 5.0, whose ViT has other names
OLD_VIT = {
    "vit.encoder.layer.*": "attention.attention.query attention.attention.key attention.attention.value"
    f" attention.output.dense {BERT_MLP}"
}
BART_LAYER = f"{SELF} self_attn.out_proj fc1 - fc2"
CLIP_LAYER = f"{SELF} self_attn.out_proj mlp.fc1 - mlp.fc2"
RWKV_ATTENTION = "attention.receptance attention.key attention.value attention.output"
RWKV_MLP = "feed_forward.key feed_forward.receptance feed_forward.value"
CROSS = "q_proj k_proj v_proj out_proj - - -"


def _t5(mlp: str, root: str = "") -> dict[str, str]:
    return {
        f"{root}encoder.block.*.layer.0.SelfAttention": "q k v o - - -",
        f"{root}encoder.block.*.layer.1.DenseReluDense": f"- - - - {mlp}",
        f"{root}decoder.block.*.layer.0.SelfAttention": "q k v o - - -",
        f"{root}decoder.block.*.layer.1.EncDecAttention": "q k v o - - -",
        f"{root}decoder.block.*.layer.2.DenseReluDense": f"- - - - {mlp}",
    }


def _bart() -> dict[str, str]:
    encoder, decoder = "model.encoder.layers.*", "model.decoder.layers.*"
    return {encoder: BART_LAYER, decoder: BART_LAYER, f"{decoder}.encoder_attn": CROSS}


def _qkv(name: str) -> str:
    return " ".join([name] * 3)


@dataclass
class Family:
    """`rows`: beginning of the layers' names (* is 0 and 1) -> one row of layers, see above."""

    model: type[nn.Module]
    config: type
    fields: dict
    rows: dict[str, str]

    def make(self) -> nn.Module:
        return self.model(self.config(**self.fields))

    def expected(self) -> dict[str, set[str]]:
        """Role -> full names, derived roles included; without the roles that no layer has."""
        query, key, value, output, up, gate, down = (self._column(i) for i in range(7))
        found = {
            "attention.query": query,
            "attention.key": key,
            "attention.value": value,
            "attention.output": output,
            "mlp.up": up,
            "mlp.gate": gate,
            "mlp.down": down,
            "intermediate": up | gate,
            "output": output | down,
            "all-attention": query | key | value | output,
            "all-mlp": up | gate | down,
        }
        return {role: names for role, names in found.items() if names}

    def _column(self, i: int) -> set[str]:
        names = {f"{start}.{row.split()[i]}" for start, row in self.rows.items() if row.split()[i] != "-"}
        return {name.replace("*", layer) for name in names for layer in "01"}


FAMILIES = {
    "bert": Family(
        hf.BertForSequenceClassification, hf.BertConfig, TEXT, {"bert.encoder.layer.*": f"{BERT} {BERT_MLP}"}
    ),
    "bert with cross-attention": Family(
        hf.BertLMHeadModel,
        hf.BertConfig,
        TEXT | {"is_decoder": True, "add_cross_attention": True},
        {
            "bert.encoder.layer.*": f"{BERT} {BERT_MLP}",
            "bert.encoder.layer.*.crossattention": "self.query self.key self.value output.dense - - -",
        },
    ),
    "bert for pre-training": Family(
        hf.BertForPreTraining, hf.BertConfig, TEXT, {"bert.encoder.layer.*": f"{BERT} {BERT_MLP}"}
    ),
    "roberta": Family(
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig,
        TEXT,
        {"roberta.encoder.layer.*": f"{BERT} {BERT_MLP}"},
    ),
    "distilbert": Family(
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig,
        DISTILBERT,
        {
            "distilbert.transformer.layer.*": "attention.q_lin attention.k_lin attention.v_lin attention.out_lin"
            " ffn.lin1 - ffn.lin2"
        },
    ),
    "albert": Family(
        hf.AlbertForSequenceClassification,
        hf.AlbertConfig,
        EMBEDDED,
        {
            "albert.encoder.albert_layer_groups.0.albert_layers.0": "attention.query attention.key attention.value"
            " attention.dense ffn - ffn_output"
        },
    ),
    "electra": Family(
        hf.ElectraForSequenceClassification,
        hf.ElectraConfig,
        EMBEDDED,
        {"electra.encoder.layer.*": f"{BERT} {BERT_MLP}"},
    ),
    "electra for pre-training": Family(
        hf.ElectraForPreTraining, hf.ElectraConfig, EMBEDDED, {"electra.encoder.layer.*": f"{BERT} {BERT_MLP}"}
    ),
    "deberta": Family(
        hf.DebertaForSequenceClassification,
        hf.DebertaConfig,
        DEBERTA,
        {"deberta.encoder.layer.*": f"{_qkv('attention.self.in_proj')} attention.output.dense {BERT_MLP}"},
    ),
    "deberta-v2": Family(
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config,
        DEBERTA,
        {
            "deberta.encoder.layer.*": "attention.self.query_proj attention.self.key_proj attention.self.value_proj"
            f" attention.output.dense {BERT_MLP}"
        },
    ),
    "mpnet": Family(
        hf.MPNetForSequenceClassification,
        hf.MPNetConfig,
        TEXT,
        {"mpnet.encoder.layer.*": f"attention.attn.q attention.attn.k attention.attn.v attention.attn.o {BERT_MLP}"},
    ),
    "modernbert": Family(
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig,
        MODERNBERT,
        {"model.layers.*": f"{_qkv('attn.Wqkv')} attn.Wo mlp.Wi mlp.Wi mlp.Wo"},
    ),
    "gpt2": Family(
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        GPT2,
        {"transformer.h.*": f"{_qkv('attn.c_attn')} attn.c_proj mlp.c_fc - mlp.c_proj"},
    ),
    "gpt2 with cross-attention": Family(
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        GPT2 | {"add_cross_attention": True},
        {
            "transformer.h.*": f"{_qkv('attn.c_attn')} attn.c_proj mlp.c_fc - mlp.c_proj",
            "transformer.h.*.crossattention": "q_attn c_attn c_attn c_proj - - -",
        },
    ),
    "gpt-j": Family(
        hf.GPTJForCausalLM,
        hf.GPTJConfig,
        GPT2 | {"rotary_dim": 2},
        {"transformer.h.*": "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.fc_in - mlp.fc_out"},
    ),
    "gpt-neox": Family(
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        TEXT,
        {"gpt_neox.layers.*": f"{_qkv('attention.query_key_value')} attention.dense {NEOX_MLP}"},
    ),
    "opt": Family(hf.OPTForCausalLM, hf.OPTConfig, OPT, {"model.decoder.layers.*": BART_LAYER}),
    "bloom": Family(
        hf.BloomForCausalLM,
        hf.BloomConfig,
        BLOOM,
        {"transformer.h.*": f"{_qkv('self_attention.query_key_value')} self_attention.dense {NEOX_MLP}"},
    ),
    "falcon": Family(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        BLOOM,
        {"transformer.h.*": f"{_qkv('self_attention.query_key_value')} self_attention.dense {NEOX_MLP}"},
    ),
    "mpt": Family(
        hf.MptForCausalLM,
        hf.MptConfig,
        MPT,
        {"transformer.blocks.*": f"{_qkv('attn.Wqkv')} attn.out_proj ffn.up_proj - ffn.down_proj"},
    ),
    "phi": Family(
        hf.PhiForCausalLM, hf.PhiConfig, TEXT, {"model.layers.*": f"{SELF} self_attn.dense mlp.fc1 - mlp.fc2"}
    ),
    "phi-3": Family(
        hf.Phi3ForCausalLM,
        hf.Phi3Config,
        TEXT,
        {
            "model.layers.*": f"{_qkv('self_attn.qkv_proj')} self_attn.o_proj"
            " mlp.gate_up_proj mlp.gate_up_proj mlp.down_proj"
        },
    ),
    "llama": Family(
        hf.LlamaForSequenceClassification, hf.LlamaConfig, SHAPED, {"model.layers.*": f"{SELF} self_attn.o_proj {GLU}"}
    ),
    "mistral": Family(
        hf.MistralForCausalLM, hf.MistralConfig, SHAPED, {"model.layers.*": f"{SELF} self_attn.o_proj {GLU}"}
    ),
    "mixtral": Family(  # its experts are no layers, but parameters of one module
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        SHAPED | {"num_local_experts": 2},
        {"model.layers.*": f"{SELF} self_attn.o_proj - - -"},
    ),
    "qwen2": Family(hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED, {"model.layers.*": f"{SELF} self_attn.o_proj {GLU}"}),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config, SHAPED, {"model.layers.*": f"{SELF} self_attn.o_proj {GLU}"}),
    "gemma-2": Family(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, SHAPED, {"model.layers.*": f"{SELF} self_attn.o_proj {GLU}"}
    ),
    "gemma-3": Family(
        hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, SHAPED, {"model.layers.*": f"{SELF} self_attn.o_proj {GLU}"}
    ),
    "deepseek-v3": Family(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        DEEPSEEK,
        {
            "model.layers.*": "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa self_attn.kv_a_proj_with_mqa"
            f" self_attn.o_proj {GLU}",
            "model.layers.*.self_attn": "q_b_proj kv_b_proj kv_b_proj - - - -",
        },
    ),
    "rwkv-4": Family(hf.RwkvForCausalLM, hf.RwkvConfig, RWKV, {"rwkv.blocks.*": f"{RWKV_ATTENTION} {RWKV_MLP}"}),
    "t5": Family(hf.T5ForConditionalGeneration, hf.T5Config, T5, _t5("wi - wo")),
    "t5 with gates": Family(hf.T5ForConditionalGeneration, hf.T5Config, GATED, _t5("wi_1 wi_0 wo")),
    "t5 for classification": Family(hf.T5ForSequenceClassification, hf.T5Config, T5, _t5("wi - wo", "transformer.")),
    "bart": Family(hf.BartForSequenceClassification, hf.BartConfig, BART, _bart()),
    "whisper": Family(hf.WhisperForConditionalGeneration, hf.WhisperConfig, WHISPER, _bart()),
    "vit": Family(hf.ViTForImageClassification, hf.ViTConfig, IMAGE, OLD_VIT if IS_OLD else {"vit.layers.*": VIT}),
    "clip": Family(
        hf.CLIPModel,
        hf.CLIPConfig,
        {"text_config": TEXT, "vision_config": IMAGE},
        {"text_model.encoder.layers.*": CLIP_LAYER, "vision_model.encoder.layers.*": CLIP_LAYER},
    ),
    "siglip": Family(  # its vision model pools with an attention and an MLP of its own
        hf.SiglipModel,
        hf.SiglipConfig,
        {"text_config": TEXT | {"projection_size": 8}, "vision_config": IMAGE},
        {"text_model.encoder.layers.*": CLIP_LAYER, "vision_model.encoder.layers.*": CLIP_LAYER},
    ),
    "wav2vec2": Family(
        hf.Wav2Vec2ForCTC,
        hf.Wav2Vec2Config,
        WAV2VEC2,
        {
            "wav2vec2.encoder.layers.*": "attention.q_proj attention.k_proj attention.v_proj attention.out_proj"
            " feed_forward.intermediate_dense - feed_forward.output_dense"
        },
    ),
}
