"""Models that see images, of 0.1M random parameters, with processors of their own: made on the spot."""

from pathlib import Path

from helpers.tiny_llama import WORDS, word_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} </s>{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}


def _tokenizer(marks: dict[str, str], template: str):
    tokenizer = word_tokenizer([*SPECIAL, *marks.values(), *WORDS.split()], *SPECIAL[:4], enclose=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[4:], *marks.values()]})
    tokenizer.chat_template = template
    return tokenizer


def _gemma3():
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    marks = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    template = TEMPLATE.replace("IMAGE", "<boi>")
    made = _tokenizer(marks, template)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        extra_special_tokens=marks,
        chat_template=template,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL[:4], strict=True)),
    )
    numbers = dict(zip(marks, tokenizer.convert_tokens_to_ids(list(marks.values())), strict=True))
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 64},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        boi_token_index=numbers["boi_token"],
        eoi_token_index=numbers["eoi_token"],
        image_token_index=numbers["image_token"],
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero at first: blind
    return model, Gemma3Processor(images, tokenizer, template, image_seq_length=4)


def _llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    template = TEMPLATE.replace("IMAGE", "<image>")
    tokenizer = _tokenizer({"image_token": "<image>"}, template)
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


FAMILIES = {"gemma3": _gemma3, "llava": _llava}


def write_tiny_vision(folder: Path, family: str) -> Path:
    """Save a model of a family, and its processor."""
    import torch

    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
