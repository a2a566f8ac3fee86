"""A tiny random checkpoint of each encoder family as users have it before they train a classifier: a masked language
model, or another pre-training model, whose files lack the classifier's head, and of some families its pooler."""

from pathlib import Path

import transformers as hf

from helpers.tiny_llama import WORDS, word_tokenizer

TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS.split()]
VOCABULARY = {"vocab_size": len(TOKENS), "pad_token_id": 0}
BERT = VOCABULARY | {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
BERT |= {"max_position_embeddings": 40}
DISTILBERT = VOCABULARY | {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 40}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
XLNET = VOCABULARY | {"d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12}
XLM = VOCABULARY | {"emb_dim": 8, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}
MOBILEBERT = BERT | {"embedding_size": 6, "intra_bottleneck_size": 4}
MODERNBERT = BERT | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BART = VOCABULARY | {"d_model": 8, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
BART |= {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 12))}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}

# Family -> its pre-training model, its configuration, and the modules that only an adapter can bring to a classifier.
ENCODERS = {
    "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig(**BERT, embedding_size=6), "classifier albert.pooler"),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**BART), "classification_head"),
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**BERT), "classifier bert.pooler.dense"),
    "bigbird": (hf.BigBirdForMaskedLM, hf.BigBirdConfig(**BERT, attention_type="original_full"), "classifier"),
    "camembert": (hf.CamembertForMaskedLM, hf.CamembertConfig(**BERT), "classifier"),
    "deberta": (hf.DebertaForMaskedLM, hf.DebertaConfig(**DEBERTA), "classifier pooler.dense"),
    "deberta-v2": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**DEBERTA), "classifier pooler.dense"),
    "distilbert": (hf.DistilBertForMaskedLM, hf.DistilBertConfig(**DISTILBERT), "classifier pre_classifier"),
    "electra": (hf.ElectraForPreTraining, hf.ElectraConfig(**BERT, embedding_size=6), "classifier"),
    "fnet": (hf.FNetForMaskedLM, hf.FNetConfig(**BERT), "classifier"),
    "longformer": (hf.LongformerForMaskedLM, hf.LongformerConfig(**BERT, attention_window=4), "classifier"),
    "mobilebert": (hf.MobileBertForMaskedLM, hf.MobileBertConfig(**MOBILEBERT), "classifier mobilebert.pooler.dense"),
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**MODERNBERT), "classifier"),
    "mpnet": (hf.MPNetForMaskedLM, hf.MPNetConfig(**BERT), "classifier"),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**BERT), "classifier"),
    "xlm": (hf.XLMWithLMHeadModel, hf.XLMConfig(**XLM), "sequence_summary"),
    "xlm-roberta": (hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig(**BERT), "classifier"),
    "xlnet": (hf.XLNetLMHeadModel, hf.XLNetConfig(**XLNET), "logits_proj sequence_summary.summary"),
}


def write_encoder(family: str, folder: Path) -> Path:
    """The family's checkpoint and a tokenizer in the folder; returns it."""
    model_class, config, _ = ENCODERS[family]
    model_class(config).save_pretrained(folder)
    word_tokenizer(TOKENS, *TOKENS[:4]).save_pretrained(folder)
    return folder
