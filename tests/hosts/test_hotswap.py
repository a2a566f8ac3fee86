"""PEFT's hotswap_adapter with BONE: as a fresh load, without compiling again; what does not fit changes nothing."""

from pathlib import Path

import pytest
import torch
from peft import BoneConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from flashbone.errors import ConfigError, FlashboneError, ShapeError
from helpers.blocks import VARIANT_NAMES
from helpers.comparison import Promise, same_bits
from helpers.mlp import MLP, fill_blocks
from helpers.processes import run_apart

SIZES = (13, 9, 6)
ROWS = torch.randn(4, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(variant: str = "bone", **fields) -> BoneConfig:
    defaults = {"r": 4, "variant": variant, "mini_r": 2, "target_modules": ["lin0", "lin1"]}
    return BoneConfig(**defaults | fields)


def saved(folder: Path, settings, seed: int = 1) -> Path:
    model = get_peft_model(MLP(SIZES), settings)
    fill_blocks(model, seed)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(MLP(SIZES), folder).eval()


def swap(model, folder: Path, name: str = "default") -> None:
    hotswap_adapter(model, str(folder), name, torch_device="cpu")


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_a_swapped_adapter_is_the_freshly_loaded_one_config_and_scale_included(variant, tmp_path):
    new = saved(tmp_path / "new", config(variant, dropout=0.25, modules_to_save=None, revision="second"), seed=2)
    model, want = loaded(saved(tmp_path / "old", config(variant))), loaded(new)
    with torch.no_grad():
        assert not torch.equal(model(ROWS), want(ROWS))  # fills the cache of inference
        model.base_model.set_scale("default", 3.0)
        blocks = [parameter for name, parameter in model.named_parameters() if "bone_" in name]
        swap(model, new)
        assert same_bits(model(ROWS), want(ROWS), Promise.SAME_PRODUCT)
    assert all(a is b for a, b in zip(blocks, (p for n, p in model.named_parameters() if "bone_" in n), strict=True))
    assert model.peft_config["default"].to_dict() == want.peft_config["default"].to_dict()
    assert model.base_model.model.lin0.bone_dropout["default"].p == 0.25
    assert not model.base_model.model.lin0.bone_dropout["default"].training


def test_an_adapter_that_is_not_active_is_compared_with_itself_and_swapped(tmp_path):
    model = loaded(saved(tmp_path / "active", config("bat-col")))
    model.load_adapter(saved(tmp_path / "old", config("mini")), "other")
    new = saved(tmp_path / "new", config("mini"), seed=2)
    want = model(ROWS)
    swap(model, new, "other")
    assert same_bits(model(ROWS), want, Promise.SAME_PRODUCT)
    model.set_adapter("other")
    assert same_bits(model(ROWS), loaded(new)(ROWS), Promise.SAME_PRODUCT)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lin1"]}, {"bias": "bone_only"}], ids=str)
def test_saved_modules_and_biases_are_swapped_along(fields, tmp_path):
    settings = {"target_modules": ["lin0"], **fields}
    folders = []
    for seed in (1, 2):
        model = get_peft_model(MLP(SIZES), config(**settings))
        fill_blocks(model, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(seed if parameter.requires_grad else 0)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    model, want = loaded(folders[0]), loaded(folders[1])
    assert not torch.equal(model(ROWS), want(ROWS))
    swap(model, folders[1])
    assert same_bits(model(ROWS), want(ROWS), Promise.SAME_PRODUCT)


MISFITS = [
    ({"r": 3}, ShapeError, r"lin0: bone adapter has a block of shape \(4, 9\) but the checkpoint holds \(3, 9\)"),
    ({"rank_pattern": {"lin1": 2}}, ShapeError, r"lin1: bone adapter has a block of shape \(4, 6\)"),
    ({"target_modules": ["lin1"]}, ShapeError, "lin0: the checkpoint has no block for it"),
    ({"variant": "mini"}, ConfigError, "variant: the model has 'bone', the new adapter 'mini'.* load_adapter"),
    ({"bottleneck_size": 4}, ConfigError, "variant: the model has 'bone', the new adapter 'orthogonal'"),
    ({"bias": "all"}, ConfigError, "bias: the model has 'none', the new adapter 'all'"),
    (
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        ConfigError,
        r"modules_to_save: the model has None, the new adapter \['lin1'\]",
    ),
]


@pytest.mark.parametrize(("fields", "kind", "message"), MISFITS)
def test_what_does_not_fit_is_refused_before_anything_changes(fields, kind, message, tmp_path):
    model = loaded(saved(tmp_path / "old", config()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.peft_config["default"].to_dict()
    with pytest.raises(kind, match=message):
        swap(model, saved(tmp_path / "new", config(**fields), seed=2))
    assert all(same_bits(tensor, before[name], Promise.UNTOUCHED) for name, tensor in model.state_dict().items())
    assert model.peft_config["default"].to_dict() == settings


def test_rotations_of_another_ridge_unknown_names_and_merged_adapters_are_refused(tmp_path):
    new = saved(tmp_path / "new", config("orthogonal", orthogonal_eps=1e-3), seed=2)
    model = loaded(saved(tmp_path / "old", config("orthogonal")))
    with pytest.raises(ConfigError, match=r"orthogonal_eps: the model has 1e-06, the new adapter 0\.001"):
        swap(model, new)
    with pytest.raises(ConfigError, match="no adapter 'typo' in this model, which has \\['default'\\]"):
        swap(model, tmp_path / "old", "typo")
    model.merge_adapter()
    want = model(ROWS)
    with pytest.raises(ConfigError, match="'default' is merged into the model; call unmerge_adapter"):
        swap(model, tmp_path / "old")
    assert same_bits(model(ROWS), want, Promise.SAME_PRODUCT)


def test_other_methods_swap_as_without_flashbone_and_never_with_bone(tmp_path):
    lora = LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    for name in ("one", "two"):
        get_peft_model(MLP(SIZES), lora).save_pretrained(tmp_path / name)
    model = loaded(tmp_path / "one")
    swap(model, tmp_path / "two")
    assert same_bits(model(ROWS), loaded(tmp_path / "two")(ROWS), Promise.SAME_PRODUCT)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and BONE") as raised:
        swap(model, saved(tmp_path / "bone", config()))
    assert not isinstance(raised.value, FlashboneError)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: BONE and LORA"):
        swap(loaded(tmp_path / "bone"), tmp_path / "one")


def test_peft_s_preparation_for_other_sizes_finds_nothing_to_pad(tmp_path):
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(loaded(saved(tmp_path, config())), target_rank=8)


COMPILED = """
import sys, torch, flashbone
sys.path += sys.argv[1:]
from test_hotswap import MLP, ROWS, VARIANT_NAMES, config, loaded, saved, swap
from pathlib import Path
for variant in VARIANT_NAMES:
    torch._dynamo.reset()
    old, new = (saved(Path(name), config(variant, dropout=seed / 10), seed) for seed, name in enumerate(["o", "n"], 1))
    model, want = loaded(old), loaded(new)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(ROWS)
        with torch.compiler.set_stance("fail_on_recompile"):
            swap(compiled, new)
            assert torch.allclose(compiled(ROWS), want(ROWS), rtol=1e-12, atol=1e-12), variant
            assert not torch.allclose(before, want(ROWS)), variant
            model.base_model.set_scale("default", 2.0)
            try:
                compiled(ROWS)
            except RuntimeError:  # so that a recompilation would have been seen
                continue
    raise AssertionError(variant)
print("swapped")
"""


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(tmp_path):
    done = run_apart(COMPILED, tmp_path)
    assert done.stdout == "swapped\n", done.stderr


def test_an_embedding_s_adapter_is_swapped_too(tmp_path):
    def model(seed: int) -> PeftModel:
        torch.manual_seed(0)
        embedding = torch.nn.Sequential(torch.nn.Embedding(9, 6))
        adapted = get_peft_model(embedding, BoneConfig(r=4, target_modules=["0"]))
        fill_blocks(adapted, seed)
        return adapted.eval()

    old, new = model(1), model(2)
    new.save_pretrained(tmp_path)
    ids = torch.arange(9)
    assert not torch.equal(old(ids), new(ids))
    swap(old, tmp_path)
    assert same_bits(old(ids), new(ids), Promise.SAME_PRODUCT)
