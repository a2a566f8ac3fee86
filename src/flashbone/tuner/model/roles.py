"""What a layer does in a transformer, read off its name: one table, whatever the model's type."""

from __future__ import annotations

# Layers that compute several things at once are in the row of each.
_QKV = "attn.c_attn attn.qkv attention.self.in_proj query_key_value qkv_proj Wqkv"
_GATE_UP = "gate_up_proj mlp.Wi"

# RWKV reads its state with the receptance; the one in its feed-forward is a gate. flash-linear-attention wraps layers
# of version 6 in a module that mixes their input (`.linear`).
_RWKV_QUERY = "attention.receptance att.receptance attn.r_proj attn.r_proj.linear"

# Role -> endings of layer names, whole parts only; * is a number, the place in a list of layers. An ending has the
# parent's name where the last part alone is ambiguous: classifiers and Mamba have an `out_proj`, too.
NAMES = {
    "attention.query": "q_proj q_a_proj q_b_proj query_proj q_lin attention.wq self.query attention.query attn.q"
    f" SelfAttention.q EncDecAttention.q crossattention.q_attn {_RWKV_QUERY} {_QKV}",
    "attention.key": "k_proj kv_a_proj_with_mqa kv_b_proj key_proj k_lin attention.wk self.key attention.key attn.k"
    f" SelfAttention.k EncDecAttention.k crossattention.c_attn att.key attn.k_proj.linear {_QKV}",
    "attention.value": "v_proj kv_a_proj_with_mqa kv_b_proj value_proj v_lin attention.wv self.value attention.value"
    f" attn.v SelfAttention.v EncDecAttention.v crossattention.c_attn att.value attn.v_proj.linear {_QKV}",
    "attention.output": "o_proj out_lin attn.out_proj attention.out_proj self_attn.out_proj encoder_attn.out_proj"
    " attention.output.dense crossattention.output.dense attention.dense self_attention.dense self_attn.dense"
    " attn.c_proj crossattention.c_proj attn.proj attn.Wo attention.wo attn.o SelfAttention.o EncDecAttention.o"
    " attention.output att.output",
    "mlp.up": "up_proj intermediate.dense intermediate_dense dense_h_to_4h *.fc1 mlp.fc1 ffn.fc1 mlp.linear_fc1"
    " mlp.c_fc mlp.fc_in ffn.lin1 *.ffn wi wi_1 feed_forward.w3 feed_forward.key ffn.key ffn.key.linear"
    f" {_GATE_UP}",
    "mlp.gate": "gate_proj wi_0 feed_forward.w1 feed_forward.receptance ffn.receptance ffn.receptance.linear"
    f" {_GATE_UP}",
    "mlp.down": "down_proj *.output.dense output_dense dense_4h_to_h *.fc2 mlp.fc2 ffn.fc2 mlp.linear_fc2 mlp.c_proj"
    " mlp.fc_out ffn.lin2 *.ffn_output DenseReluDense.wo feed_forward.w2 mlp.Wo"
    " feed_forward.value ffn.value",
}

# `intermediate` and `output` are BERT's names.
DERIVED = {
    "intermediate": ("mlp.up", "mlp.gate"),
    "output": ("attention.output", "mlp.down"),
    "all-attention": ("attention.query", "attention.key", "attention.value", "attention.output"),
    "all-mlp": ("mlp.up", "mlp.gate", "mlp.down"),
}

ROLES = (*NAMES, *DERIVED)

# Layers inside these parts have no role: heads, embeddings, routers, indexers, connectors of two towers.
_WITHOUT_ROLE = {
    *("classification_head", "classifier", "cls", "head", "lm_head", "pooler", "predictions", "score"),
    *("embeddings", "patch_embed", "patch_embeddings", "gate", "router", "compressor", "indexer"),
    *("connector", "merger", "multi_modal_projector"),
}

_ROLES_OF_ENDING = {
    ending: [role for role, names in NAMES.items() if ending in names.split()]
    for ending in " ".join(NAMES.values()).split()
}
_ROLES_OF_ENDING["self_attn.gate_proj"] = []  # it gates what an attention returns


def roles_of_name(name: str) -> list[str]:
    """Roles of the layer of this name, without derived ones: those of its longest ending in the table."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    if not _WITHOUT_ROLE.isdisjoint(parts[:-1]):
        return []
    endings = (".".join(parts[i:]) for i in range(len(parts)))
    return next((_ROLES_OF_ENDING[ending] for ending in endings if ending in _ROLES_OF_ENDING), [])
