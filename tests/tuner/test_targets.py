"""Roles, containers and names in `target_modules`: the layers they mean, model by model, and the saved names."""

import copy
import json

import pytest
import torch
from peft import BoneConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from torch import nn

from flashbone import BoneLayer
from flashbone.errors import ConfigError
from flashbone.tuner.model import TargetError
from flashbone.tuner.roles import NAMES, ROLES, held_by
from flashbone.tuner.targets import resolved, roles_of
from helpers.families import FAMILIES

TRAINED = ("bert", "albert", "modernbert", "gpt2", "gpt-neox", "phi-3", "llama", "mixtral", "t5 with gates", "bart")
TRAINED = (*TRAINED, "rwkv-4")
# Entries that are also a module or a layer of the family, which wins: it holds a part of the role.
CONTAINERS = {
    ("bert with cross-attention", "attention.output"): "bert.encoder.layer.*.attention.output.dense",
    ("mpnet", "output"): "mpnet.encoder.layer.*.output.dense",
    ("rwkv-4", "output"): "rwkv.blocks.*.attention.output",
}


def config(*targets: str, **fields) -> BoneConfig:
    return BoneConfig(**{"r": 4, "target_modules": list(targets)} | fields)


def adapted(model: nn.Module) -> list[str]:
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    return [name for name, module in inner.named_modules() if isinstance(module, BoneLayer)]


def of_layers(*names: str) -> set[str]:
    return {name.replace("*", layer) for name in names for layer in "01"}


class Linears(nn.Module):
    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(*size))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Linears(q_proj=(8, 8), k_proj=(8, 8), v_proj=(8, 8), out_proj=(8, 8))
        self.mlp = Linears(gate_proj=(8, 12), up_proj=(8, 12), down_proj=(12, 8))
        self.router = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention, mlp = self.self_attn, self.mlp
        x = attention.out_proj(attention.q_proj(x) * attention.k_proj(x) + attention.v_proj(x))
        return mlp.down_proj(mlp.gate_proj(x).tanh() * mlp.up_proj(x)) * self.router(x).mean()


class Unknown(nn.Module):
    """A model that no table knows, with names as they are usual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query = nn.Linear(8, 8), nn.EmbeddingBag(4, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = Linears(out_proj=(8, 8), down_proj=(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head.down_proj(self.head.out_proj(self.blocks(self.embed(x)) + self.query.weight[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_of_a_family_is_exactly_these_layers(family):
    model, expected = FAMILIES[family].make(), FAMILIES[family].expected()
    assert {role: set(names) for role, names in roles_of(model).items()} == expected
    for role, names in expected.items():
        names = of_layers(CONTAINERS[family, role]) if (family, role) in CONTAINERS else names
        wanted = config(role)
        assert set(resolved(model, wanted)) == names
        assert wanted.target_modules == {role}
    for role in {"attention.output", "output", "all-attention", "all-mlp"} & expected.keys():
        assert set(adapted(get_peft_model(copy.deepcopy(model), wanted := config(role)))) == set(
            resolved(model, config(role))
        )
        assert set(resolved(model, wanted)) == set(resolved(model, config(role)))  # by the names that it now holds


@pytest.mark.parametrize("family", TRAINED)
def test_an_adapter_put_by_roles_trains_and_the_head_stays(family):
    model = get_peft_model(FAMILIES[family].make(), config("output", "attention.query", init_weights=False))
    tokens = torch.randint(3, 30, (2, 6))
    tokens[:, -1] = 2  # BART classifies at the end of a sentence
    fields = {"decoder_input_ids": tokens} if family.startswith("t5") else {}
    adapters = {f"base_model.model.{name}.bone_block.default" for name in adapted(model)}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(input_ids=tokens, **fields).logits.square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == adapters
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == adapters


def test_every_name_of_the_table_is_a_layer_of_some_model_of_these_tests():
    models = [family.make() for family in FAMILIES.values()]
    endings = {
        ".".join(["*" if part.isdigit() else part for part in name.split(".")][-n:])
        for model in models
        for name in roles_of(model).get("all-attention", []) + roles_of(model).get("all-mlp", [])
        for n in (1, 2, 3)
    }
    elsewhere = {  # models that are too large to build here, or not of transformers: as their authors name layers
        "attn.qkv": "attention.query attention.key attention.value",  # Qwen2-VL's images, timm
        "attn.proj": "attention.output",
        "mlp.linear_fc1": "mlp.up",  # Qwen3-VL's images
        "mlp.linear_fc2": "mlp.down",
        "ffn.fc1": "mlp.up",  # Florence-2
        "ffn.fc2": "mlp.down",
        "attention.wq": "attention.query",  # Llama as Meta wrote it
        "attention.wk": "attention.key",
        "attention.wv": "attention.value",
        "attention.wo": "attention.output",
        "feed_forward.w1": "mlp.gate",
        "feed_forward.w2": "mlp.down",
        "feed_forward.w3": "mlp.up",
        "att.receptance": "attention.query",  # RWKV as its author wrote it
        "att.key": "attention.key",
        "att.value": "attention.value",
        "att.output": "attention.output",
        "ffn.key": "mlp.up",
        "ffn.receptance": "mlp.gate",
        "ffn.value": "mlp.down",
        "attn.r_proj": "attention.query",  # flash-linear-attention's RWKV-7, and RWKV-6 with what wraps its layers
        "attn.r_proj.linear": "attention.query",
        "attn.k_proj.linear": "attention.key",
        "attn.v_proj.linear": "attention.value",
        "ffn.key.linear": "mlp.up",
        "ffn.receptance.linear": "mlp.gate",
    }
    assert held_by("blocks.0.att.gate") == held_by("layers.0.attn.g_proj.linear") == []  # of the attention's output
    assert {name: " ".join(held_by(f"layers.0.{name}")) for name in elsewhere} == elsewhere
    table = set(" ".join(NAMES.values()).split())
    assert table - endings == set(elsewhere)


def test_a_model_that_no_table_knows_is_adapted_by_its_usual_names():
    model, wanted = Unknown(), config("attention.output", "all-mlp")
    trained = get_peft_model(model, wanted)
    mlp = [f"blocks.*.mlp.{name}_proj" for name in ("up", "gate", "down")]
    assert set(adapted(trained)) == of_layers("blocks.*.self_attn.out_proj", *mlp)
    assert wanted.target_modules == {"self_attn.out_proj", "up_proj", "gate_proj", "mlp.down_proj"}
    trained(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_the_output_of_torchs_own_attention_holds_its_role():
    model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(8, 2), "up_proj": nn.Linear(8, 8)})
    assert roles_of(model)["attention.output"] == ["self_attn.out_proj"]
    assert roles_of(model)["mlp.up"] == ["up_proj"]


@pytest.mark.parametrize(
    ("family", "entry", "names"),
    [
        ("albert", "attention.query", ["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"]),
        ("roberta", "out_proj", ["classifier.out_proj"]),
        ("bert", "output.dense", ["bert.encoder.layer.*.output.dense", "bert.encoder.layer.*.attention.output.dense"]),
    ],
)
def test_a_name_that_a_layer_has_is_kept_as_it_is_written(family, entry, names):
    wanted = config(entry)
    assert set(adapted(get_peft_model(FAMILIES[family].make(), wanted))) == of_layers(*names)
    assert wanted.target_modules == {entry}


def test_a_name_wins_over_a_role_of_the_same_spelling():
    model, wanted = nn.ModuleDict({"mlp": Linears(gate=(8, 2), gate_proj=(8, 8))}), config("mlp.gate")
    assert roles_of(model)["mlp.gate"] == ["mlp.gate_proj"]
    assert adapted(get_peft_model(model, wanted)) == ["mlp.gate"]


def test_names_containers_and_roles_go_together_and_roles_add_no_name_that_is_there():
    wanted = config("q_proj", "all-attention", "layers.1.mlp")
    model = get_peft_model(FAMILIES["llama"].make(), wanted)
    mlp = {f"1.mlp.{name}_proj" for name in ("up", "gate", "down")}
    assert wanted.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"} | mlp
    assert len(adapted(model)) == 2 * 4 + 3


@pytest.mark.parametrize(
    ("family", "entry", "written", "count"),
    [
        ("bert", "attention.output", {"attention.output.dense"}, 2),
        ("bert", "intermediate", {"intermediate.dense"}, 2),
        ("bert", "output", {"output.dense"}, 4),
        ("bert", "layer.1.attention", {f"1.attention.self.{n}" for n in ("query", "key", "value")}
         | {"1.attention.output.dense"}, 4),
        ("roberta", "classifier", {"classifier.dense", "out_proj"}, 2),
        ("gpt2", "attn", {"c_attn", "attn.c_proj"}, 4),
        ("clip", "vision_model.encoder", None, 12),
    ],
)  # fmt: skip
def test_a_module_with_layers_inside_means_every_one_of_them(family, entry, written, count):
    wanted = config(entry)
    model = get_peft_model(FAMILIES[family].make(), wanted)
    assert len(adapted(model)) == count
    assert all(f".{entry}." in f".{name}" for name in adapted(model))
    assert written is None or wanted.target_modules == written


def test_a_container_leaves_out_what_is_trained_as_a_whole():
    wanted = config("blocks.0", modules_to_save=["blocks.0.mlp"])
    model = get_peft_model(Unknown(), wanted)
    attention = {f"blocks.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
    assert set(adapted(model)) == attention | {"blocks.0.router"}
    assert sum("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad) == 6


@pytest.mark.parametrize("entry", ["mlp.down", "output", "all-attention", "layer.1.output"])
def test_a_saved_config_names_the_layers_and_loads_on_the_same_ones(entry, tmp_path):
    model = get_peft_model(FAMILIES["bert"].make(), config(entry))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert not set(saved) & {*ROLES, entry}
    again = PeftModel.from_pretrained(FAMILIES["bert"].make(), tmp_path)
    assert adapted(again) == adapted(model)
    assert set(again.peft_config["default"].target_modules) == set(saved)


def test_where_one_name_has_two_roles_the_saved_names_tell_them_apart():
    wanted = config("mlp.down")
    get_peft_model(FAMILIES["bert"].make(), wanted)
    assert wanted.target_modules == {"0.output.dense", "1.output.dense"}
    wanted = config("mlp.down")
    get_peft_model(FAMILIES["gpt2"].make(), wanted)
    assert wanted.target_modules == {"mlp.c_proj"}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "bert",
            ["mlp.gate", "attention.query"],
            "target_modules: this model has no layer with the role 'mlp.gate'; it has attention.query, attention.key,"
            " attention.value, attention.output, mlp.up, mlp.down",
        ),
        (
            "mixtral",
            ["mlp.gate", "all-mlp", "intermediate"],
            "target_modules: this model has no layer with the roles 'all-mlp', 'intermediate', 'mlp.gate'; it has"
            " attention.query, attention.key, attention.value, attention.output",
        ),
    ],
)
def test_a_role_that_the_model_lacks_is_named_with_those_it_has(family, targets, message):
    model, wanted = FAMILIES[family].make(), config(*targets)
    for attempt in (resolved, get_peft_model):
        with pytest.raises(TargetError) as caught:
            attempt(model, wanted)
        assert str(caught.value) == message
        assert wanted.target_modules == set(targets)
    assert not adapted(model)


def test_without_any_role_the_error_names_the_linear_layers():
    with pytest.raises(TargetError) as caught:
        get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), config("all-attention"))
    assert str(caught.value) == (
        "target_modules: this model has no layer with the role 'all-attention'; nor with any other; its linear layers"
        " end in: 0, 2"
    )


def test_what_is_neither_name_nor_role_is_left_to_peft():
    model = FAMILIES["llama"].make()
    assert len(resolved(model, config("attention.output", "typo"))) == 2
    wanted = config("typo")
    with pytest.raises(TargetError, match=r"not found in the base model.*Linear layers of this model end in: q_proj"):
        get_peft_model(model, wanted)
    assert wanted.target_modules == {"typo"}


def test_a_name_of_a_module_that_cannot_be_adapted_says_so():
    wanted = config("query", "intermediate")
    for attempt in (resolved, get_peft_model):
        with pytest.raises(ConfigError, match="query: target module cannot be adapted, it is an EmbeddingBag"):
            attempt(Unknown(), wanted)
        assert wanted.target_modules == {"query", "intermediate"}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-attention", 8),
        ("attention.output", 2),
        ("intermediate", 4),
        (r".*\.1\..*q_proj", 1),
        (".*proj", 14),
        ("all-linear", 14),
        ("ALL-LINEAR", 14),
    ],
)
def test_a_string_is_a_role_only_where_it_is_exactly_one(targets, count):
    model = FAMILIES["llama"].make()
    fields = {"target_modules": targets, "task_type": "SEQ_CLS"}
    names = resolved(model, BoneConfig(r=4, **fields))
    assert len(names) == count
    assert adapted(get_peft_model(model, BoneConfig(r=4, **fields))) == names


def test_a_string_that_matches_a_module_as_an_expression_stays_one():
    model = nn.ModuleDict({"output": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
    wanted = BoneConfig(r=4, target_modules="output")
    assert resolved(model, wanted) == adapted(get_peft_model(model, wanted)) == ["output"]
    assert wanted.target_modules == "output"


def test_a_string_that_is_a_role_and_the_ending_of_a_layer_means_the_layer():
    wanted = BoneConfig(r=4, target_modules="attention.query")
    assert len(adapted(get_peft_model(FAMILIES["albert"].make(), wanted))) == 1
    assert wanted.target_modules == {"attention.query"}


def test_a_second_adapter_finds_the_layers_of_the_first_and_the_others():
    model = get_peft_model(FAMILIES["bert"].make(), config("attention.output", modules_to_save=["classifier"]), "first")
    model.add_adapter("second", config("output", "mlp.up"))
    model.add_adapter("third", config("encoder"))
    layers = dict(model.base_model.model.named_modules())
    held = {name: [n for n in adapted(model) if name in layers[n].bone_block] for name in model.peft_config}
    expected = FAMILIES["bert"].expected()
    assert set(held["first"]) == expected["attention.output"]
    assert set(held["second"]) == expected["output"] | expected["mlp.up"]
    assert set(held["third"]) == expected["all-attention"] | expected["all-mlp"]
    assert model.peft_config["second"].target_modules == {"output.dense", "intermediate.dense"}
    assert set(resolved(model.base_model.model, config("all-mlp"))) == expected["all-mlp"]
    assert {role: set(names) for role, names in roles_of(model.base_model.model).items()} == expected


def test_a_layer_with_another_methods_adapter_keeps_its_roles():
    model = FAMILIES["llama"].make()
    before = roles_of(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert roles_of(model) == before


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "layer"}]
)
def test_roles_and_containers_go_to_the_chosen_layers_only(fields):
    wanted = config("attention.output", "mlp.down", "attention.self", **fields)
    model = get_peft_model(FAMILIES["bert"].make(), wanted)
    expected = FAMILIES["bert"].expected()
    assert set(adapted(model)) == {n for n in expected["all-attention"] | expected["mlp.down"] if ".1." in n}
    assert wanted.target_modules == {"output.dense", "query", "key", "value"}
    assert resolved(FAMILIES["bert"].make(), wanted) == adapted(model)


def test_excluded_layers_are_left_out_of_roles_and_sizes_are_set_by_name():
    fields = {"exclude_modules": ["0.mlp.up_proj", "o_proj"], "rank_pattern": {"mlp.down_proj": 2}}
    wanted = config("all-mlp", "output", **fields)
    model = get_peft_model(FAMILIES["llama"].make(), wanted)
    layers = dict(model.base_model.model.named_modules())
    assert set(adapted(model)) == FAMILIES["llama"].expected()["all-mlp"] - {"model.layers.0.mlp.up_proj"}
    assert wanted.target_modules == {"up_proj", "gate_proj", "down_proj"}
    sizes = {name: layers[name].bone_r["default"] for name in adapted(model)}
    assert sizes == {name: 2 if name.endswith("down_proj") else 4 for name in adapted(model)}


def test_a_role_of_which_nothing_is_left_is_an_error():
    for fields in ({"layers_to_transform": [7]}, {"exclude_modules": r".*"}):
        wanted = config("mlp.down", **fields)
        assert resolved(FAMILIES["bert"].make(), wanted) == []
        with pytest.raises(TargetError, match="Linear layers of this model end in"):
            get_peft_model(FAMILIES["bert"].make(), wanted)
        assert wanted.target_modules == {"mlp.down"}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "modernbert", "clip", "vit"])
def test_no_targets_mean_pefts_table_and_else_all_linear_layers(family):
    model = FAMILIES[family].make()
    known = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING.get(model.config.model_type)
    names = resolved(model, BoneConfig(r=4))
    if known is None:
        assert names == resolved(model, BoneConfig(r=4, target_modules="all-linear"))
    wanted = BoneConfig(r=4)
    assert adapted(get_peft_model(model, wanted)) == names
    assert known is None or wanted.target_modules == set(known)


def test_models_on_the_meta_device_resolve_and_take_adapters():
    with torch.device("meta"):
        model = FAMILIES["llama"].make()
    assert set(resolved(model, config("all-mlp"))) == FAMILIES["llama"].expected()["all-mlp"]
    model = get_peft_model(model, config("all-mlp"), low_cpu_mem_usage=True)
    assert set(adapted(model)) == FAMILIES["llama"].expected()["all-mlp"]


@pytest.mark.parametrize("fields", [{"exclude_modules": ["attention.query"]}, {"rank_pattern": {"attention.query": 2}}])
def test_roles_in_other_fields_are_refused_with_the_names_to_use(fields):
    model, (field,) = FAMILIES["llama"].make(), fields
    message = f"{field}: 'attention.query' is a role, which only target_modules takes; name its layers, .* q_proj$"
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, config("all-attention", **fields))
    assert not adapted(model)


def test_a_role_as_a_string_goes_with_layers_to_transform():
    wanted = BoneConfig(r=4, target_modules="mlp.down", layers_to_transform=[1])
    model = get_peft_model(FAMILIES["llama"].make(), wanted)
    assert adapted(model) == ["model.layers.1.mlp.down_proj"]
