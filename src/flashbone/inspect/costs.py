"""What a method keeps for backward and computes in one call of one layer, in formulas explained in docs/inspect.md."""

from __future__ import annotations

from dataclasses import dataclass

LORA = "lora"
SUMS_SHARDS = ("bone", "mini")  # keep S(x), which is as narrow as the block


@dataclass(frozen=True)
class Setting:
    """How a layer is called while training.

    Attributes:
        tokens: rows of x: batch times sequence.
        activation_bytes: bytes of one number of x.
        casts: whether activations are in half precision and the adapter in fp32: its matrices are cast for the product.
        dropout: whether the adapter drops entries of its input.
        use_orthogonal: whether the block of orthogonal becomes a rotation, by a solve.
        mask_bytes: bytes of one entry of a dropout's mask: 1 on GPUs.
    """

    tokens: int
    activation_bytes: int
    casts: bool
    dropout: bool
    use_orthogonal: bool = True
    mask_bytes: int = 1


@dataclass(frozen=True)
class Kept:
    """Bytes that one call of a layer keeps for backward.

    Attributes:
        own: for this layer alone.
        input: of x as it came, which layers that see the very same x keep together.
    """

    own: int
    input: int


def kept(method: str, in_features: int, r: int, parameters: int, setting: Setting) -> Kept:
    """What a method (a variant, or "lora") of block size or rank r keeps, beyond what the frozen layer does.

    `bone` and `mini` keep S(x), LoRA x and x A^T, all others x. Dropout makes an x of its own for each layer and keeps
    its mask. In half precision the matrices are kept as they were cast, and PEFT's LoRA casts x to fp32 and back, so
    that each layer has its own. A rotation keeps itself, in fp32.
    """
    x = setting.tokens * in_features * setting.activation_bytes
    narrow = setting.tokens * r * setting.activation_bytes if method in (*SUMS_SHARDS, LORA) else 0
    mask = setting.tokens * in_features * setting.mask_bytes if setting.dropout else 0
    rebuilt = parameters * setting.activation_bytes if setting.casts else 0
    if method == "orthogonal" and setting.use_orthogonal:
        rebuilt += parameters * 4
    if method in SUMS_SHARDS:
        return Kept(narrow + mask + rebuilt, 0)
    if setting.dropout or (method == LORA and setting.casts):
        return Kept(x + narrow + mask + rebuilt, 0)
    return Kept(narrow + rebuilt, x)


def multiply_adds(method: str, out: int, in_features: int, r: int, width: int, setting: Setting) -> float:
    """Multiply-adds that a method adds to the forward pass of a layer, for each token.

    Of `bone` and `mini` (whose block is `width` columns wide) the additions of S(x) count, too. What is done once a
    call, bat-col's weight and the solve of orthogonal, is divided by the number of tokens.
    """
    if method in SUMS_SHARDS:
        return in_features + r * width
    if method == LORA:
        return r * (in_features + out)
    if method == "bat-col":
        return out * in_features * r / setting.tokens
    if method == "bat-row":
        return in_features * r
    assert method == "orthogonal", f"no formula for {method}"
    # An LU decomposition, r^3 / 3, and r right-hand sides, r^2 each; a ragged tail is left alone.
    solve = 4 / 3 * r**3 if setting.use_orthogonal else 0
    return in_features // r * r * r + solve / setting.tokens
