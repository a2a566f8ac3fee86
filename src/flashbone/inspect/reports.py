"""What is reported of a model and of an adapter, also as JSON. Multiply-adds are for each token of a forward pass.

Groups hold names that differ in their numbers only; the figures of a group are of all its members together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figures:
    """What an adapter, or a group of its layers, costs.

    Attributes:
        trainable_parameters: of an adapter with biases and modules to save.
        percent_of_base: trainable parameters in percent of the base's parameters.
        activation_bytes: what the adapter keeps for backward, in addition to what the frozen base keeps.
        training_bytes: weights, gradients, AdamW's two moments and activations; for a whole adapter with the base's
            weights.
        multiply_adds: in addition to the base's.
        percent_of_linears: multiply_adds in percent of those of the base's linear layers.
    """

    trainable_parameters: int
    percent_of_base: float
    activation_bytes: int
    training_bytes: int
    multiply_adds: float
    percent_of_linears: float


@dataclass(frozen=True)
class Costs(Figures):
    """What one method costs on a model.

    Attributes:
        method: a variant, or "lora".
        r: block size, or rank.
        file_bytes: of adapter_model.safetensors.
        weight_bytes: of the adapter, in addition to the base's.
        state_bytes: gradients and AdamW's two moments.
    """

    method: str
    r: int
    file_bytes: int
    weight_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class LayerGroup(Figures):
    """Adapted layers."""

    modules: str
    layers: int
    out_features: int
    in_features: int
    r: int
    block_shape: tuple[int, ...]


@dataclass(frozen=True)
class TrainedGroup:
    """Parameters that are trained besides the blocks; figures as in `Figures`."""

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
class BaseFacts:
    """What is known of a base without an adapter.

    Attributes:
        architecture: name of its class.
        parameters: tied ones count once.
        base_bytes: of the parameters, in the dtype of the training.
        linear_multiply_adds: of the linear layers.
        quantised_by: the method that the config names, if any; the figures are those of the plain model.
        labels: of the classification head, by the config; None without such a head. Training takes the data's.
        assumption: how layers are counted whose inputs and calls are not known; empty if all are.
    """

    architecture: str
    parameters: int
    base_bytes: int
    linear_multiply_adds: float
    quantised_by: str | None
    labels: int | None
    assumption: str


@dataclass(frozen=True)
class ModelReport(BaseFacts):
    """What training an adapter on a model would cost.

    Attributes:
        dtype: of the base while training.
        tokens: batch times sequence of one training step.
        config: fields of the adapter's configuration that decide what it costs.
        is_recommended: whether the adapter has the published setting for this model.
        recommended: the published setting; None for models larger than all that were published.
        others: what is trained besides.
        lora: of a LoRA on the same layers, with the rank that comes nearest in trainable parameters.
    """

    model: str
    dtype: str
    tokens: int
    config: dict[str, Any]
    is_recommended: bool
    recommended: Recommendation | None
    layers: tuple[LayerGroup, ...]
    others: tuple[TrainedGroup, ...]
    costs: Costs
    lora: Costs


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of adapted modules.

    Attributes:
        r: block size, or LoRA's rank.
        shapes: of the tensors of each module.
        orthogonality_error: largest `max |Q^T Q - I|`; None without a Q, or if it is not finite.
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
    """Tensors besides the blocks, which replace the base's."""

    names: str
    count: int
    shape: tuple[int, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class EngineVerdict:
    """Whether a serving engine could take the adapter: "exact", "approximate" or "no", and how, or why not."""

    name: str
    verdict: str
    how: str


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter's file holds.

    Attributes:
        layout: who writes such files.
        method: "BONE", "MISS" or "LORA".
        variant: of the Bone family; None if the file leaves it open, or the method is another.
        evidence: how method and variant were told.
        base_model: folder or hub id, if the file names one.
        dtypes: dtype -> number of tensors.
        file_bytes: of the file that holds the tensors.
        not_finite: number of values that are NaN or infinite.
        not_finite_in: names of their tensors.
        untrained: number of modules whose tensors are zero, as they started.
        others: tensors that replace the base's.
        engines: that take plain LoRA adapters; empty where the names are RWKV's own.
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
    engines: tuple[EngineVerdict, ...]
