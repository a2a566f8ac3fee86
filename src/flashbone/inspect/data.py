"""What is reported of a model and of an adapter; multiply-adds are for each token of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Costs:
    """What one method costs on a model.

    Attributes:
        method: a variant, or "lora".
        r: block size, or rank.
        trainable_parameters: all that are trained, biases and modules to save included.
        percent_of_base: those, of the base's parameters.
        file_bytes: of adapter_model.safetensors.
        weight_bytes: of the adapter, in addition to the base's.
        state_bytes: gradients and AdamW's two moments.
        activation_bytes: what the adapter keeps for backward, in addition to what the frozen base keeps.
        training_bytes: the base's weights and the three above.
        multiply_adds: in addition to the base's.
        percent_of_linears: those, of the multiply-adds of the base's linear layers.
    """

    method: str
    r: int
    trainable_parameters: int
    percent_of_base: float
    file_bytes: int
    weight_bytes: int
    state_bytes: int
    activation_bytes: int
    training_bytes: int
    multiply_adds: float
    percent_of_linears: float


@dataclass(frozen=True)
class LayerGroup:
    """Adapted layers that differ in the numbers of their names only; the figures are of all of them together, as in
    `Costs`, but for `training_bytes`, which leaves the base's weights out."""

    modules: str
    layers: int
    out_features: int
    in_features: int
    r: int
    block_shape: tuple[int, ...]
    trainable_parameters: int
    percent_of_base: float
    activation_bytes: int
    training_bytes: int
    multiply_adds: float
    percent_of_linears: float


@dataclass(frozen=True)
class TrainedGroup:
    """Parameters that are trained besides the blocks and differ in the numbers of their names only, as `LayerGroup`."""

    names: str
    count: int
    shape: tuple[int, ...]
    trainable_parameters: int
    percent_of_base: float
    training_bytes: int


@dataclass(frozen=True)
class Recommendation:
    """The published setting of the orthogonal variant for a model's size."""

    r: int
    dropout: float
    orthogonal_eps: float


@dataclass(frozen=True)
class ModelReport:
    """What training an adapter on a model would cost.

    Attributes:
        model: as it was named.
        architecture: name of its class.
        parameters: of the base; tied ones count once.
        base_bytes: of those, in `dtype`.
        dtype: of the base while training; the adapter's is in `Costs`.
        quantised_by: the method that the config names, if any; the figures are those of the plain model.
        labels: of the classification head, by the config; None where there is none. Training takes the data's.
        tokens: batch times sequence of one training step.
        linear_multiply_adds: of the base's linear layers.
        config: fields of the adapter's configuration that decide what it costs.
        is_recommended: whether that is the published setting for this model.
        recommended: the published ones; None for models that are larger than all that were published.
        layers: the adapted layers.
        others: what is trained besides.
        costs: of the adapter.
        lora: of a LoRA on the same layers, with the rank that comes nearest in trainable parameters.
        assumption: on layers of which it is not known what they see and how often they are called; empty if it is.
    """

    model: str
    architecture: str
    parameters: int
    base_bytes: int
    dtype: str
    quantised_by: str | None
    labels: int | None
    tokens: int
    linear_multiply_adds: float
    config: dict[str, Any]
    is_recommended: bool
    recommended: Recommendation | None
    layers: tuple[LayerGroup, ...]
    others: tuple[TrainedGroup, ...]
    costs: Costs
    lora: Costs
    assumption: str


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of modules that differ in the numbers of their names only; parameters and bytes are of all of them.

    Attributes:
        modules: names in one.
        count: of the modules.
        r: block size, or LoRA's rank.
        shapes: of each module's tensors.
        parameters: numbers.
        bytes: of those.
        orthogonality_error: largest `max |Q^T Q - I|`; None where there is no Q, or it is not finite.
        rotation_deg: largest angle by which a Q turns a plane.
    """

    modules: str
    count: int
    r: int
    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    bytes: int
    orthogonality_error: float | None = None
    rotation_deg: float | None = None


@dataclass(frozen=True)
class TensorGroup:
    """Tensors besides the blocks, which take the place of the base's, and differ in the numbers of their names only."""

    names: str
    count: int
    shape: tuple[int, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Engine:
    """Whether a serving engine could take the adapter.

    Attributes:
        name: of the engine.
        verdict: "exact", "approximate", or "no".
        how: what has to be done, or why not.
    """

    name: str
    verdict: str
    how: str


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter's file holds.

    Attributes:
        adapter: its path.
        layout: who writes such files.
        method: "BONE", "MISS" or "LORA".
        variant: of the Bone family; None where the file does not say it, or the method is another.
        evidence: what the variant was read off, or what can be told and what cannot.
        base_model: folder or hub id, if the file says.
        dtypes: dtype -> number of tensors.
        tensors: number of all.
        bytes: of all tensors.
        file_bytes: of the file that holds them.
        not_finite: values that are NaN or infinite.
        not_finite_in: names of the tensors that hold them.
        untrained: blocks in which every value is zero.
        blocks: of the adapted modules.
        others: whole tensors that take the place of the base's.
        engines: that take plain LoRA adapters; none where the names are RWKV's own.
    """

    adapter: str
    layout: str
    method: str
    variant: str | None
    evidence: str
    base_model: str | None
    dtypes: dict[str, int]
    tensors: int
    bytes: int
    file_bytes: int
    not_finite: int
    not_finite_in: tuple[str, ...]
    untrained: int
    blocks: tuple[BlockGroup, ...]
    others: tuple[TensorGroup, ...]
    engines: tuple[Engine, ...]
