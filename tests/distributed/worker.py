"""What each of two processes runs: all variants under one engine, then what is asked of that engine alone.

Started by accelerate's launcher with one of examples/accelerate/*.yaml: `worker.py ENGINE FOLDER`. The main process
writes the report that the tests judge.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pretend
import small_runs
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from flashbone.errors import FlashboneError
from flashbone.tuner.layers.layer import BoneLinear
from flashbone.variants import VARIANTS
from helpers.comparison import Promise, same_bits

# Even the smallest parameter is sharded, and everything is given back after each module.
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


class GatheredBytes(TorchDispatchMode):
    """Sums up what all-gathers return."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            self.total += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def layers(model) -> list[BoneLinear]:
    return [module for module in model.modules() if isinstance(module, BoneLinear)]


def loss_of(model) -> torch.Tensor:
    ids = torch.tensor([row["input_ids"] for row in small_runs.rows()[: small_runs.BATCH]])
    return model(input_ids=ids, labels=ids).loss


def one_step(model) -> dict[str, int]:
    """Bytes that are gathered in a step; bytes of base weights that are there between forward and backward."""
    backward = getattr(model, "backward", torch.Tensor.backward)  # DeepSpeed's engine has its own
    backward(loss_of(model))  # gives back what the forward before had left
    shapes, saved = {tuple(layer.base_layer.weight.shape) for layer in layers(model)}, []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with GatheredBytes() as gathered:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model)
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if tuple(t.shape) in shapes}
        backward(loss)
    model.zero_grad()
    return {"gathered": gathered.total, "held": sum(held.values())}


def train(variant: str, folder: Path, **fields):
    """A trained model in its engine's clothes, and the report on it."""
    trainer = small_runs.trainer(small_runs.adapted(variant), folder, **fields)
    if trainer.is_deepspeed_enabled:
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"].update(NOTHING_STAYS)
    trainer.train()
    trainer.save_model()
    report = {"losses": small_runs.losses(trainer), "engine": type(trainer.model_wrapped).__name__}
    report["logits"] = small_runs.logits(trainer.model_wrapped).tolist()
    return trainer, report


def merging(model) -> dict[str, object]:
    """Logits of the merged model, and how the base was after unmerging."""

    def shards():
        weights = [layer.base_layer.weight for layer in layers(model)]
        return [getattr(W, "ds_tensor", getattr(W, "_local_tensor", W)).detach().clone() for W in weights]

    before = shards()
    model.merge_adapter(safe_merge=True)
    merged = small_runs.logits(model).tolist()
    changed = sum(not torch.equal(a, b) for a, b in zip(before, shards(), strict=True))
    model.unmerge_adapter()
    same = all(same_bits(a, b, Promise.UNTOUCHED) for a, b in zip(before, shards(), strict=True))
    return {"merged": merged, "changed": changed, "unmerged_is_the_same": same}


@contextmanager
def recorded(report: dict, key: str) -> Iterator[None]:
    """The error of the block goes into the report."""
    report[key] = None
    try:
        yield
    except FlashboneError as error:
        report[key] = str(error)


def extras_of_fsdp2(folder: Path, report: dict) -> None:
    """Units that fit the layers less well than decoder layers; a base in half precision; checkpointing."""
    from torch.distributed.fsdp import fully_shard

    for variant in ("bone", "bat-col"):
        model = small_runs.adapted(variant)
        for layer in layers(model):
            fully_shard(layer.base_layer)
        fully_shard(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, 0.02)
        loss = loss_of(model)
        loss.backward()
        grads = {n: p.grad.full_tensor().norm().item() for n, p in model.named_parameters() if p.grad is not None}
        report[f"own units {variant}"] = {"loss": loss.item(), "grads": grads}
    model = small_runs.adapted("bone")
    fully_shard(layers(model)[0].bone_block)
    fully_shard(model)
    with recorded(report, "blocks as units"):
        loss_of(model)
    half = small_runs.trainer(small_runs.adapted("bat-col", torch.bfloat16), folder / "half")
    half.train()
    report["half"] = small_runs.losses(half)
    report["half dtypes"] = sorted({str(p.dtype) for p in half.model.parameters()})
    checkpointed = train("bat-col", folder / "checkpointed", gradient_checkpointing=True)[1]
    report["checkpointed"] = checkpointed["losses"]


def main(engine: str, folder: Path) -> None:
    if engine == "fsdp2":
        pretend.processes_have_accelerators()
    report: dict = {}
    for variant in VARIANTS:
        trainer, report[variant] = train(variant, folder / variant)
        if engine in ("fsdp2", "zero3"):
            report[variant] |= one_step(trainer.model_wrapped) | merging(trainer.model)
    if engine == "fsdp2":
        extras_of_fsdp2(folder, report)
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # engines leave threads behind that may wait for each other
