"""A Llama of 0.1M parameters with a tokenizer of its own, made on the spot: small enough to train in seconds."""

from pathlib import Path

WORDS = "the cat dog sat ran on under a mat tree what did do where is was it red blue big small ? . , : yes no"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def write_tiny_llama(folder: Path, chat_template: str | None = CHAT) -> Path:
    """Save the model and its tokenizer into `folder`."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = tiny_tokenizer(chat_template)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(vocabulary: int):
    """Two layers; the size of the MLP is no multiple of the block sizes used in the tests."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **heads)


def tiny_tokenizer(chat_template: str | None = CHAT):
    """One token a word; unlike Llama's it adds none of its own."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = word_tokenizer([*special, *WORDS.split()], *special[:4], enclose=False)
    tokenizer.add_special_tokens({"additional_special_tokens": special[4:]})
    tokenizer.chat_template = chat_template
    return tokenizer


def word_tokenizer(words: list[str], pad: str, begin: str, end: str, unknown: str, enclose: bool = True):
    """A tokenizer of whole words; `enclose` puts the begin and end tokens around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if enclose:
        ends = [(token, vocabulary[token]) for token in (begin, end)]
        raw.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, bos_token=begin, eos_token=end, unk_token=unknown
    )


def questions(count: int) -> list[dict[str, str]]:
    """Prompts and completions that a model can learn: where an animal sat."""
    rows = []
    for i in range(count):
        animal, place = ("cat", "mat") if i % 2 else ("dog", "tree")
        size = ("big", "small", "red", "blue")[i % 4]
        rows.append({"prompt": f"where was the {size} {animal} ?", "completion": f" on the {place} . yes it sat"})
    return rows


# Writes all that a conversation may hold: system, tools, calls and results of tools, reasoning.
FULL_CHAT = (
    "{% if tools %}<|system|>{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<|{{ m.role if m.role in ('system', 'user', 'assistant') else 'user' }}|>"
    "{% if m.reasoning_content %}(thinks: {{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = FULL_CHAT):
    """One token a byte, so that it knows every text; unlike Llama's it adds none of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({word: number for number, word in enumerate([*special, *letters])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special[4:]})
    tokenizer.chat_template = chat_template
    return tokenizer
