"""What users call on an adapted model besides PEFT's methods: scales, sums, backends, caches, LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from flashbone.errors import ConfigError
from flashbone.ops import backend
from flashbone.tuner.layers.calls import Gate, changes_model, one_call
from flashbone.tuner.layers.layer import bone_layers
from flashbone.tuner.model import lora, weighted
from flashbone.tuner.model.merges import Merges


class Controls(Merges):
    """Base of BoneModel; PeftModel forwards to it."""

    _keeps_originals = True
    _caches = True
    _backend = "torch"

    @property
    def gate(self) -> Gate:
        """Lets changes of the model wait for its calls."""
        return vars(self).setdefault("_gate", Gate())

    @changes_model
    def disable_adapter_layers(self) -> None:
        """Switch all adapters off; those that are merged are taken out, which layers would do in their next call."""
        self.check_unmerge()
        super().disable_adapter_layers()
        for _, layer in self._merged_layers():
            layer.unmerge()

    @changes_model
    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()

    def keep_originals(self, keep: bool) -> None:
        """Set whether merging keeps the pristine weights in host memory (the default), for a bit-exact unmerge."""
        self._keeps_originals = keep
        for _, layer in bone_layers(self.model):
            layer.keep_original = keep

    def cache_in_inference(self, keep: bool) -> None:
        """Set whether eval mode without grad keeps what it builds from blocks and weights while a call runs (the
        default): `generate`, or a block of `unchanged`. Nothing outlives a call.

        Sums of several adapters' blocks are small. bat-col's shifted weight, kept from the second step with few tokens
        on while one thread calls the model, is as large as the layer's weight: where memory is short, merge the
        adapter, or switch this off.
        """
        self._caches = keep
        for _, layer in bone_layers(self.model):
            layer.caches = keep

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Make a block of code one call of the model, such as a decoding loop of your own: what eval mode without grad
        builds from blocks and weights is kept until the block ends, so nothing may write to them in it. Changes of the
        model in other threads wait, as for a call."""
        with one_call(self.gate):
            yield

    @changes_model
    def set_backend(self, name: str) -> None:
        """Choose what computes shard sums (bone, mini) and input shifts (bat-row): "torch", or "triton" for its fused
        kernels, which need a GPU (docs/triton.md).

        Raises:
            ConfigError: no backend has that name.
            BackendError: the package triton cannot be imported; nothing is changed.
        """
        backend.get(name)
        self._backend = name
        for _, layer in bone_layers(self.model):
            layer.backend = name

    @changes_model
    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply what the adapter adds to the model by `scale`, until it is set again; 1 is the trained strength."""
        if adapter not in self.peft_config:
            raise ConfigError(f"set_scale: no adapter {adapter!r} in this model, which has {list(self.peft_config)}")
        for _, layer in bone_layers(self.model):
            layer.set_scale(adapter, scale)

    @changes_model
    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Make a new adapter that is exactly the weighted sum of others.

        `delta(new) = sum_i weights[i] * scale_i * delta(adapters[i])`, for adapters of one variant and block size;
        `bone` and `mini` of different sizes combine as well. For anything else, activate the adapters together and
        give each its `set_scale`.

        Args:
            adapters: Names of the adapters to combine.
            weights: A factor, of any sign, for each.
            adapter_name: Name of the new adapter. It is not active.
            combination_type: "linear", the only one that is exact for the family.

        Raises:
            ConfigError: the adapters cannot be combined exactly; the model is as it was.
        """
        weighted.add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def to_lora(
        self, adapter_name: str = "default", rank: int | None = None, error: float | None = None
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The adapter as a LoRA of PEFT, with its scale multiplied in: exact for `bone` and `mini`; for the others the
        best of a rank on this base. Changes nothing; adapters may be merged, except into an embedding.

        Args:
            adapter_name: Its name.
            rank: Rank of the LoRA. None takes that of the largest block, for `bone` and `mini`.
            error: The largest relative error of a layer's delta, in Frobenius norm, instead of a rank.

        Returns:
            The configuration, and the tensors under the names of PEFT's files, with biases and modules to save.

        Raises:
            ConfigError: rank and error contradict each other, or one is needed; a layer cannot have a LoRA (a
                convolution, a parameter, out_proj of nn.MultiheadAttention); the adapter trains single parameters
                whole; a weight cannot be read, or an embedding is merged.
            NonFiniteError: a delta holds NaN or infinity.
        """
        return lora.to_lora(self, adapter_name, rank, error)

    def save_as_lora(
        self,
        path: str | Path,
        adapter_name: str = "default",
        rank: int | None = None,
        error: float | None = None,
    ) -> None:
        """Write the folder of a LoRA that PEFT and serving engines load; see `to_lora`."""
        lora.save_as_lora(self, path, adapter_name, rank, error)
