"""Two CPU processes under each engine: the losses, the saved adapters and the merges of one process."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import small_runs
import torch
from launching import launch
from peft import PeftModel
from safetensors.torch import load_file

from flashbone.tuner.layers.layer import BoneLinear
from flashbone.variants import VARIANTS
from helpers.comparison import close, relative_error

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ENGINES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModel", "zero2": "DeepSpeedEngine"}
ENGINES["zero3"] = ENGINES["zero2"]
# Twenty steps of AdamW carry the different order of sums on: 2e-7 of the losses, 1e-5 of the weights were seen.
LOSSES, WEIGHTS = 2e-6, 1e-4


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict:
    """Losses and model of each variant, trained here."""
    runs = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp(variant)
        trainer = small_runs.trainer(small_runs.adapted(variant), folder)
        trainer.train()
        trainer.save_model()
        runs[variant] = (small_runs.losses(trainer), trainer.model, folder)
    return runs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folder and report of an engine; its two processes are started once for all variants."""

    @functools.cache
    def run(engine: str) -> tuple[Path, dict]:
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed; make test-deepspeed runs these")
        folder = tmp_path_factory.mktemp(engine)
        launch(engine, str(HERE / "worker.py"), engine, str(folder))
        return folder, json.loads((folder / "report.json").read_text())

    return run


@pytest.fixture
def fsdp2(two_processes) -> dict:
    return two_processes("fsdp2")[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_one_process(variant, engine, one_process, two_processes):
    _, report = two_processes(engine)
    assert report[variant]["engine"] == ENGINES[engine]
    got, want = torch.tensor(report[variant]["losses"]), torch.tensor(one_process[variant][0])
    assert len(want) == small_runs.STEPS
    assert want[-1] < want[0] - 0.05
    assert relative_error(got, want) < LOSSES


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_adapter_is_whole_and_one_process_loads_it(variant, engine, one_process, two_processes):
    folder, report = two_processes(engine)
    saved, want = (load_file(f / "adapter_model.safetensors") for f in (folder / variant, one_process[variant][2]))
    assert saved.keys() == want.keys()
    assert max(relative_error(saved[name], want[name]) for name in want) < WEIGHTS
    model = PeftModel.from_pretrained(small_runs.tiny_model(), folder / variant)
    assert close(small_runs.logits(model), torch.tensor(report[variant]["logits"]))


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_models_are_merged_and_unmerged_bit_for_bit(variant, engine, two_processes):
    found = two_processes(engine)[1][variant]
    assert close(torch.tensor(found["merged"]), torch.tensor(found["logits"]))
    assert found["changed"] == 14  # every adapted layer
    assert found["unmerged_is_the_same"]


def padded_bytes(model, *parts: str) -> int:
    """What is gathered of the parameters with such names: FSDP2 fills the first axis up to the two processes."""
    found = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
    return sum(-(-p.shape[0] // 2) * 2 * p[0].numel() * p.element_size() for p in found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp2_gathers_each_layer_twice_a_step_and_nothing_more_for_bat_col(variant, fsdp2):
    model = small_runs.adapted(variant)
    twice, once = (".layers.", "embed_tokens"), ("model.norm", "lm_head")
    assert fsdp2[variant]["gathered"] == 2 * padded_bytes(model, *twice) + padded_bytes(model, *once)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero3_gathers_each_layer_twice_a_step_and_nothing_more_for_bat_col(variant, two_processes):
    model, found = small_runs.adapted(variant), two_processes("zero3")[1]

    def size(*parts: str) -> int:
        return sum(4 * p.numel() for name, p in model.named_parameters() if any(part in name for part in parts))

    first = "layers.0.self_attn."
    # The model's input needs no gradient: these are read for an input or weight that an adapter shifts only.
    unread = [f"{first}{name}_proj.base_layer" for name in "qkv"] if variant in ("bone", "mini") else []
    not_in_backward = ["layers.0.input_layernorm", *unread]
    twice = size(".layers.", "model.norm", "lm_head")
    assert found[variant]["gathered"] == 2 * twice + size("embed_tokens") - size(*not_in_backward)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_base_weight_is_held_between_forward_and_backward(variant, engine, two_processes):
    assert two_processes(engine)[1][variant]["held"] == 0


@pytest.mark.parametrize("variant", ["bone", "bat-col"])
def test_base_layers_that_are_units_of_their_own_are_gathered_to_be_read(variant, fsdp2):
    model = small_runs.adapted(variant)
    for layer in model.modules():
        if isinstance(layer, BoneLinear):
            torch.nn.init.constant_(layer.bone_block["default"], 0.02)
    ids = torch.tensor([row["input_ids"] for row in small_runs.rows()[: small_runs.BATCH]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = fsdp2[f"own units {variant}"]
    assert found["loss"] == pytest.approx(loss.item(), rel=LOSSES)
    want = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert found["grads"] == pytest.approx(want, rel=1e-4)


def test_blocks_that_are_units_of_their_own_are_refused_with_the_remedy(fsdp2):
    assert "wrap whole decoder layers (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)" in fsdp2["blocks as units"]


def test_a_base_in_bf16_takes_adapters_in_fp32(fsdp2, one_process):
    assert fsdp2["half dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert relative_error(torch.tensor(fsdp2["half"]), torch.tensor(one_process["bat-col"][0])) < 5e-3


def test_activation_checkpointing_changes_no_loss(fsdp2, one_process):
    got, want = torch.tensor(fsdp2["checkpointed"]), torch.tensor(one_process["bat-col"][0])
    assert relative_error(got, want) < LOSSES
