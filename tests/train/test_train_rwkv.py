"""Whole runs on small RWKV models: what is learned, resumed, merged into .pth files, and gone on with."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import BoneConfig, PeftModel, get_peft_model
from training_runs import stop_at
from transformers import AutoModelForCausalLM

import flashbone
from flashbone.errors import ConfigError, FlashboneError
from flashbone.files import reading
from flashbone.rwkv import RwkvTokenizer, from_pth
from flashbone.train.arguments import trainer_arguments
from flashbone.train.data.formats import open_examples
from flashbone.train.data.loading import load_data
from flashbone.train.data.tokens import bracketed, tokenise
from flashbone.train.data.windows import windows_for
from flashbone.train.folder import RunFolder
from flashbone.train.recipe import DataRecipe, Recipe, RwkvSettings
from flashbone.train.run import train
from flashbone.train.trainers import build_trainer
from helpers.binidx import write_binidx
from helpers.comparison import Promise, relative_error, same_bits
from helpers.rwkv import reference_logits, write_rwkv

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
    pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning"),  # peft looks for one
]
pytest.importorskip("rwkv", reason="rwkv is not installed; `make test` does it")

VOCABULARY = 260  # a byte a token, under the ids of the world vocabulary, so that heads are small


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "bytes.txt"
    path.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Questions and answers of the ChatterBot corpus as query and response, as in MetaMathQA."""
    pytest.importorskip("chatterbot_corpus", reason="chatterbot-corpus is not installed; `make test` does it")
    import yaml

    place = Path(importlib.util.find_spec("chatterbot_corpus").submodule_search_locations[0], "data", "english")
    talks = [talk for file in sorted(place.glob("*.yml")) for talk in yaml.safe_load(file.read_text())["conversations"]]
    rows = [{"query": str(t[0]), "response": str(t[1])} for t in talks if isinstance(t, list) and len(t) > 1]
    path = tmp_path_factory.mktemp("corpus") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:400]))
    return path


@pytest.fixture(scope="module", params=[7, 6], ids=lambda v: f"v{v}")
def base(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / f"v{request.param}.pth"
    return write_rwkv(path, request.param, hidden=32, head=8, layers=2, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def base6(tmp_path_factory) -> Path:
    return write_rwkv(tmp_path_factory.mktemp("base") / "v6.pth", 6, hidden=32, head=8, vocabulary=VOCABULARY)


@pytest.fixture
def recipe_for(corpus, vocabulary):
    """Makes a recipe for a model and an output, over the corpus, with changes."""
    return functools.partial(make_recipe, vocabulary, corpus)


def make_recipe(vocabulary, corpus, model, output, **changes) -> Recipe:
    training = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "disable_tqdm": True}
    training |= {"logging_steps": 1, "max_length": 96, **changes.pop("training", {})}
    data = {"path": str(corpus), "eval": 16, "allow_cut": True}
    fields = {
        "model": str(model),
        "data": DataRecipe(**data | changes.pop("data", {})),
        "output": str(output),
        "adapter": {"variant": "bone", "r": 8},
        "training": training,
        "samples": 0,
        "rwkv": {"vocabulary": str(vocabulary), **changes.pop("rwkv", {})},
    }
    return Recipe(**{**fields, **changes})


def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_thirty_steps_learn_resume_exactly_and_merge_into_a_file_that_the_rwkv_package_runs(
    recipe_for, base, tmp_path, monkeypatch
):
    """Loss falls, a run that was cut off ends the same, and the merged .pth is the trained model."""
    training = {"max_steps": 30, "save_steps": 10}
    summary = train(recipe_for(base, tmp_path / "run", merge=True, training=training, samples=2)).summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 1
    assert [sample["before"] != sample["after"] for sample in summary["samples"]] == [True, True]
    assert sum(losses(tmp_path / "run")[-5:]) < sum(losses(tmp_path / "run")[:5]) - 3

    cut = recipe_for(base, tmp_path / "cut", merge=True, training=training, samples=2)
    stop_at(25, cut, monkeypatch)
    assert RunFolder(cut.output).last_checkpoint().name == "checkpoint-20"
    resumed = train(cut, resume=True).summary
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    assert resumed["eval_loss_after"] == summary["eval_loss_after"]

    model = from_pth(base)
    trained = PeftModel.from_pretrained(model, str(tmp_path / "run" / "adapter")).eval()
    tokens = [byte + 1 for byte in b"what is AI?"]
    with torch.no_grad():
        want = trained(input_ids=torch.tensor([tokens])).logits[0]
    version = 7 if "v7" in base.name else 6
    merged = tmp_path / "run" / "merged.pth"
    assert torch.load(merged, weights_only=True).keys() == torch.load(base, weights_only=True).keys()
    [(steps, whole)] = reference_logits(version, [(merged, tokens)], tmp_path / "reference")
    scale = want.square().mean().sqrt()
    assert (steps - want).abs().max() / scale < 2e-5
    assert (whole - want).abs().max() / scale < 2e-5
    with torch.no_grad():
        plain = from_pth(base)(torch.tensor([tokens])).logits[0]
    assert (plain - want).abs().max() / scale > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bone", "mini", "bat-row", "bat-col", "orthogonal"])
def test_the_rwkv_package_computes_what_the_adapted_model_does_after_merging_each_variant(base, variant, tmp_path):
    version = 7 if "v7" in base.name else 6
    config = BoneConfig(variant=variant, r=8, init_weights=False, target_modules="all-linear")
    if variant == "mini":
        config.mini_r = 4
    adapted = get_peft_model(from_pth(base), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "bone_block" in name:
                parameter.mul_(0.3)
    tokens = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        want = adapted(input_ids=tokens).logits[0]
        plain = from_pth(base)(tokens).logits[0]
    adapted.save_pretrained(tmp_path / "adapter")
    flashbone.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "streamed.pth")
    merged = adapted.merge_and_unload()
    merged.to_pth(tmp_path / "live.pth")
    streamed, live = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("streamed", "live"))
    assert all(same_bits(streamed[name], live[name], Promise.SAME_PRODUCT) for name in live)
    [(steps, whole)] = reference_logits(version, [(tmp_path / "live.pth", tokens[0].tolist())], tmp_path)
    with torch.no_grad():
        ours = merged(tokens).logits[0]
    scale = want.square().mean().sqrt()
    for theirs in (steps, whole):  # the same weights, so the largest difference; then also what merging rounded
        assert (theirs - ours).abs().max() / scale < 2e-5
        assert (theirs - want).square().mean().sqrt() / scale < 2e-5
    assert (plain - want).abs().max() / scale > 1e-2
    targets = 2 * (6 if version == 7 else 8)
    assert len(reading.read_adapter(tmp_path / "adapter").blocks) == targets


@pytest.mark.slow
def test_a_folder_of_the_model_is_trained_like_its_file(recipe_for, vocabulary, base, tmp_path):
    from_pth(base).save_pretrained(tmp_path / "folder")
    RwkvTokenizer(vocabulary).save_pretrained(tmp_path / "folder")
    train(recipe_for(base, tmp_path / "file", merge=True))
    recipe = recipe_for(tmp_path / "folder", tmp_path / "run", merge=True, rwkv={"vocabulary": None, "l2_wrap": False})
    train(recipe)
    # The weights lie elsewhere in memory, so that products may round otherwise, and AdamW makes more of it.
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "file"), rel=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").state_dict()
    want = torch.load(tmp_path / "file" / "merged.pth", weights_only=True)
    assert all(relative_error(merged[name], tensor) < 1e-3 for name, tensor in want.items())


@pytest.mark.slow
def test_passing_the_state_on_gives_the_same_run(recipe_for, base, tmp_path):
    whole = train(recipe_for(base, tmp_path / "whole")).summary
    pieces = train(recipe_for(base, tmp_path / "pieces", rwkv={"chunk_ctx": 20})).summary
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert pieces["eval_loss_after"] == pytest.approx(whole["eval_loss_after"], rel=1e-4)
    cut = train(recipe_for(base, tmp_path / "cut", rwkv={"chunk_ctx": 20, "carry_gradient": False})).summary
    assert cut["eval_loss_after"] != pytest.approx(whole["eval_loss_after"], rel=1e-6)


@pytest.mark.slow
def test_layer_norms_and_time_values_are_trained_along_and_merged(recipe_for, base6, tmp_path):
    recipe = recipe_for(base6, tmp_path / "run", merge=True, rwkv={"train_parts": ["ln", "time"]})
    train(recipe)
    adapter = reading.read_adapter(tmp_path / "run" / "adapter")
    state = torch.load(base6, weights_only=True)
    wanted = {n for n in state if ".ln" in n or n.startswith("ln_out") or ".time_" in n}
    assert adapter.replacements.keys() == wanted
    merged = torch.load(tmp_path / "run" / "merged.pth", weights_only=True)
    moved = {name for name, tensor in state.items() if not torch.equal(tensor, merged[name])}
    assert moved == wanted | {f"{name}.weight" for name in adapter.blocks}


@pytest.mark.slow
def test_a_state_is_learned_along_and_merged(recipe_for, base, tmp_path):
    train(recipe_for(base, tmp_path / "run", merge=True, rwkv={"train_parts": ["state"]}))
    adapter, merged = reading.read_adapter(tmp_path / "run" / "adapter"), from_pth(tmp_path / "run" / "merged.pth")
    assert len(adapter.replacements) == merged.config.num_hidden_layers
    for name, state in adapter.replacements.items():
        assert state.any()
        same_bits(merged.get_parameter(name).detach(), state, Promise.STORED)


@pytest.mark.slow
def test_layer_norms_of_a_bf16_model_take_the_published_steps(recipe_for, base, tmp_path):
    """2e-5 is far below bf16's rounding of weights around 1: they are trained in fp32."""
    training = {"max_steps": 1, "learning_rate": 2e-5, "lr_scheduler_type": "constant", "bf16": True, "use_cpu": True}
    train(recipe_for(base, tmp_path / "run", rwkv={"train_parts": ["ln"]}, training=training))
    held = reading.read_adapter(tmp_path / "run" / "adapter").replacements
    before = torch.load(base, weights_only=True)
    for name in ("blocks.1.ln1.weight", "blocks.1.att.ln_x.weight", "ln_out.weight"):
        assert held[name].dtype == torch.float32
        step = (held[name] - before[name].bfloat16().float()).abs().median().item()
        assert step == pytest.approx(2e-5, rel=0.1), name


@pytest.mark.slow
def test_time_decay_learns_at_a_rate_of_its_own(recipe_for, base6, tmp_path):
    """One step of AdamW moves every number by its learning rate."""
    before = torch.load(base6, weights_only=True)
    for factor in (2.0, 5.0):
        out = tmp_path / str(factor)
        settings = {"train_parts": ["time"], "time_decay_lr": factor}
        training = {"max_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
        train(recipe_for(base6, out, merge=True, rwkv=settings, training=training))
        after = torch.load(out / "merged.pth", weights_only=True)
        for name, rate in (("time_decay", factor * 1e-3), ("time_decay_w1", 1e-3), ("time_maa_x", 1e-3)):
            key = f"blocks.1.att.{name}"
            step = (after[key] - before[key]).abs().median().item()
            assert step == pytest.approx(rate, rel=0.01), name


def test_the_l2_wrap_adds_its_gradient_and_nothing_to_the_loss(recipe_for, base, tmp_path):
    recipe = recipe_for(base, tmp_path, rwkv={"l2_wrap": True}, data={"eval": None})
    args = trainer_arguments(recipe)
    trainer, _ = build_trainer(recipe, args, load_data(recipe, windows_for(args)))
    model = trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    trained = [p for p in model.parameters() if p.requires_grad]
    found, items = [], torch.tensor(321)
    for wraps in (True, False):
        trainer._settings = RwkvSettings(l2_wrap=wraps)
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
        found.append((loss.item(), torch.autograd.grad(loss, trained)))
    assert found[0][0] == found[1][0]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    largest = logits.max(-1).values[inputs["labels"][:, 1:] != -100]
    want = torch.autograd.grad(1e-4 / 2 * largest.square().sum() / 321, trained)
    for with_it, without, wanted in zip(found[0][1], found[1][1], want, strict=True):
        assert (with_it - without - wanted).norm() < 1e-5 * (without.norm() + wanted.norm())
        assert (with_it - without).norm() > 1e-4 * without.norm()


@pytest.mark.slow
def test_training_goes_on_with_an_adapter_of_rwkv_peft_and_is_written_back(recipe_for, base, tmp_path):
    """bat-row from a .disha file, with LayerNorms: trained on, merged, and converted back under the same names."""
    torch.manual_seed(3)
    held = {f"blocks.{i}.att.{p}.disha": torch.randn(4, 8, 8) / 30 for i in (0, 1) for p in ("receptance", "value")}
    held |= {"blocks.0.ffn.value.disha": torch.randn(13, 8, 8) / 30, "ln_out.weight": torch.rand(32) + 0.5}
    held["ln_out.bias"] = torch.randn(32) / 9
    torch.save(held, tmp_path / "rwkv-0.pth")
    recipe = recipe_for(base, tmp_path / "run", adapter={}, init_adapter=str(tmp_path / "rwkv-0.pth"), merge=True)
    start = train(recipe_for(base, tmp_path / "plain", training={"max_steps": 1})).summary
    summary = train(recipe).summary
    assert summary["variant"] == "bat-row"
    assert summary["eval_loss_before"] != start["eval_loss_before"]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    flashbone.convert(tmp_path / "run" / "adapter", tmp_path / "rwkv-1.pth", to="rwkv-peft")
    again = torch.load(tmp_path / "rwkv-1.pth", weights_only=True)
    assert again.keys() == held.keys()
    assert all(again[name].shape == tensor.shape for name, tensor in held.items())
    assert all(not torch.equal(again[name], tensor) for name, tensor in held.items())
    flashbone.merge_checkpoint(base, tmp_path / "rwkv-1.pth", tmp_path / "merged.pth")
    merged, ours = (torch.load(p, weights_only=True) for p in (tmp_path / "merged.pth", tmp_path / "run/merged.pth"))
    assert all(same_bits(merged[name], ours[name], Promise.SAME_PRODUCT) for name in ours)


@pytest.mark.slow
def test_tokenised_documents_longer_than_the_chunk_are_trained(recipe_for, vocabulary, base, tmp_path):
    tokenizer = RwkvTokenizer(vocabulary)
    text = "The quick brown fox jumps over the lazy dog. " * 12
    write_binidx(tmp_path / "docs", [tokenizer(f"{i}: {text}")["input_ids"] for i in range(12)])
    recipe = recipe_for(
        base,
        tmp_path / "run",
        data={"path": str(tmp_path / "docs.bin"), "eval": 2},
        training={"max_length": 96, "max_steps": 12, "learning_rate": 2e-2},
        rwkv={"chunk_ctx": 32},
    )
    summary = train(recipe).summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 1


def test_what_does_not_go_together_is_refused_before_anything_is_written(recipe_for, vocabulary, base, llama, tmp_path):
    def refused(words, model=base, **changes):
        with pytest.raises(FlashboneError, match=words) as caught:
            train(recipe_for(model, tmp_path / "out", **changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("rwkv.train_parts: got \\['att'\\], wanted a list, each ln, time or state", rwkv={"train_parts": ["att"]})
    refused("rwkv.chunk_ctx: got 0, wanted a number of tokens", rwkv={"chunk_ctx": 0})
    refused("rwkv.time_decay_lr: got -1, wanted a positive number", rwkv={"time_decay_lr": -1})
    refused("rwkv: got .*, wanted vocabulary, chunk_ctx", rwkv={"ctx": 3})
    refused("rwkv: .* is a LlamaForCausalLM, no RWKV-6 or RWKV-7", model=llama, rwkv={"chunk_ctx": 16})
    from_pth(base).save_pretrained(tmp_path / "folder")
    RwkvTokenizer(vocabulary).save_pretrained(tmp_path / "folder")
    refused("rwkv.vocabulary: .* is a folder, which has its own tokenizer", model=tmp_path / "folder")
    refused("packed sequence .* set packing_strategy: wrapped", training={"packing": True})
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    refused("chunk_ctx: does not go with use_reentrant: true", rwkv={"chunk_ctx": 16}, training=reentrant)
    refused("rwkv, model: RWKV models and init_adapter are for task sft", task="classification")
    refused("init_adapter describes the adapter; leave adapter.variant, adapter.r out", init_adapter="x")
    refused("init_adapter .*: no such file or folder", adapter={}, init_adapter=str(tmp_path / "missing"))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused("init_adapter .*lora: is a LORA adapter, not a Bone", adapter={}, init_adapter=str(tmp_path / "lora"))
    refused("no such file; the .pth file of an RWKV model was wanted", model=tmp_path / "missing.pth")
    if base.name == "v7.pth":
        refused("this model has no time_\\* values, which are RWKV-6's", rwkv={"train_parts": ["time"]})
        torch.save({"blocks.0.att.key.disha": torch.randn(8, 16)}, tmp_path / "narrow.pth")
        refused("blocks.0.att.key", adapter={}, init_adapter=str(tmp_path / "narrow.pth"))
        torch.save({"blocks.7.att.key.disha": torch.randn(8, 32)}, tmp_path / "deep.pth")
        refused("blocks.7.att.key", adapter={}, init_adapter=str(tmp_path / "deep.pth"))
        held = {"init_adapter": str(tmp_path / "deep.pth"), "adapter": {}, "rwkv": {"train_parts": ["ln"]}}
        refused("it says what is trained; leave modules_to_save", **held)


@pytest.mark.slow
def test_a_resumed_run_must_keep_its_settings(recipe_for, base, tmp_path):
    train(recipe_for(base, tmp_path / "run", training={"max_steps": 2}))
    other = recipe_for(base, tmp_path / "run", rwkv={"chunk_ctx": 16}, training={"max_steps": 3})
    with pytest.raises(ConfigError, match=r"holds a run of another recipe: rwkv.chunk_ctx was None, is 16"):
        train(other, resume=True)


def test_of_rwkv_s_texts_the_answers_are_learned_with_the_blank_line_that_ends_them():
    """As by RWKV-PEFT's `--loss_mask qa`."""
    text = "System: be brief\n\nUser: the cat?\n\nAssistant: on the mat\n\nUser: the dog?\n\nAssistant: out\nthere"
    reading = open_examples(iter([("d:1", {"text": text})]), "sft", "d", "rwkv")
    tokenizer = RwkvTokenizer()
    (row,) = (bracketed(row, tokenizer) for example in reading.examples for row in tokenise(example, tokenizer))
    assert row == (
        "System: be brief\n\nUser: the cat?\n\nAssistant:[[ on the mat\n\n]]"
        "User: the dog?\n\nAssistant:[[ out\nthere\n\n]]"
    )
