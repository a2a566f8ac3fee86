"""From the names of a live model to those of its checkpoint: base-model prefixes, tied weights, transposed layers."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

# transformers' Conv1D keeps its weight as (in, out). These are the model types that have it, and its layers in them.
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_LAYERS = ("c_attn", "q_attn", "c_fc", "c_proj")

INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tokens_embed", "shared", "embed_in", "tok_embeddings")
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_embeddings")

RWKV_NAME = re.compile(r"(emb|head|ln_out|blocks\.\d+\.(att|ffn|ln\d))(\.|$)")  # in RWKV's own checkpoints


def rwkv_lead(names: Sequence[str]) -> str | None:
    """The leading part, such as `model.` or none, after which all names are those of RWKV's own checkpoints; None if
    some are others."""
    lead, others = _best_rwkv_lead(names)
    return None if others else lead


def not_rwkv(names: Sequence[str]) -> list[str]:
    """The names that RWKV's own checkpoints lack, after the leading part that leaves the fewest."""
    return _best_rwkv_lead(names)[1]


def _best_rwkv_lead(names: Sequence[str]) -> tuple[str, list[str]]:
    leads = dict.fromkeys(["", *(f"{name.partition('.')[0]}." for name in names[:1])])
    others = {
        lead: [n for n in names if not (n.startswith(lead) and RWKV_NAME.match(n[len(lead) :]))] for lead in leads
    }
    return min(others.items(), key=lambda item: len(item[1]))


def locate(wanted: Iterable[str], stored: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Find parameters of a live model among the tensors of a checkpoint.

    A name is taken as it is; where it is missing, one leading part (the base model's prefix, such as `bert.` or
    `transformer.`) may be dropped or added, the same for all names.

    Returns:
        Parameter -> tensor, and for those without one parameter -> reason.
    """
    below: dict[str, list[str]] = {}
    for name in stored:
        below.setdefault(name.partition(".")[2], []).append(name)
    located: dict[str, str] = {}
    lost: dict[str, str] = {}
    shifted: dict[str, str] = {}
    for name in wanted:
        tail = name.partition(".")[2]
        near = [*([tail] if tail.count(".") and tail in stored else []), *below.get(name, [])]
        if name in stored:
            located[name] = name
        elif len(near) == 1:
            located[name] = near[0]
            shifted[name] = f"-{name.partition('.')[0]}" if near[0] == tail else f"+{near[0].partition('.')[0]}"
        else:
            lost[name] = f"could be any of {', '.join(sorted(near))}" if near else _absent(name)
    if len(set(shifted.values())) > 1:
        lost |= {name: f"could be {located.pop(name)}, but other names differ by another prefix" for name in shifted}
    return located, lost


def _absent(name: str) -> str:
    if name.endswith(".time_state"):
        return "a learned state, which only a live model takes: merge_and_unload() it, and write that with to_pth"
    return "not in the base"


def is_transposed(tensor: str, config: dict[str, Any]) -> bool | None:
    """Whether the checkpoint keeps this weight as (in, out); None if the config has no model_type.

    Decided by the model type and the layer's name, never by the shape: square layers look the same either way.
    """
    if tensor.split(".")[-2:-1] not in [[layer] for layer in CONV1D_LAYERS]:
        return False
    model_type = config.get("model_type")
    if model_type is None:
        return None
    if model_type in CONV1D_TYPES:
        return True
    part = config.get(tensor.partition(".")[0])  # encoder and decoder of a composite model
    return isinstance(part, dict) and part.get("model_type") in CONV1D_TYPES


def dotted_endings(name: str) -> Iterator[str]:
    """The endings of a name in whole parts, the shortest first."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in reversed(range(len(parts))))


def has_tied_embeddings(config: dict[str, Any], stored: Collection[str]) -> bool:
    """Whether loading the checkpoint makes one tensor of the input and output embeddings, as far as can be told."""
    text = config.get("text_config")
    flag = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    return flag is True or (flag is None and not any(is_embedding(name, OUTPUT_EMBEDDINGS) for name in stored))


def is_embedding(parameter: str, names: tuple[str, ...]) -> bool:
    """Whether the parameter belongs to a module of one of these names."""
    return parameter.split(".")[-2:-1] in [[name] for name in names]
