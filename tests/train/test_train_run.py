"""Runs of training: they learn, on the response only, and write what they promise; what is wrong is one line."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import metrics_of, recipe_for

from flashbone.errors import ConfigError, FlashboneError, FormatError, NonFiniteError
from flashbone.merge import merge_checkpoint
from flashbone.train.recipe import DataRecipe
from flashbone.train.run import train
from flashbone.train.summary import peak_memory
from helpers.comparison import Promise, close, same_bits
from helpers.tiny_llama import WORDS, tiny_config, tiny_tokenizer, word_tokenizer, write_tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by peft
]


def test_a_run_learns_and_writes_everything_it_promises(llama, questions_file, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    training = {"logging_steps": 7, "save_strategy": "no"}
    result = train(recipe_for(llama, questions_file, out, merge=True, training=training))

    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.2
    assert (summary["steps"], summary["train_rows"], summary["eval_rows"]) == (10, 72, 8)
    assert summary["tokens"] == 10 * 8 * 14  # 14 tokens a row: six, seven, and the end of text
    for figure in ("trainable_parameters", "trainable_percent", "train_s", "tokens_per_s", "peak_mib"):
        assert summary[figure] > 0
    rows = metrics_of(out)
    assert rows[0]["step"] == 0
    assert rows[0]["eval_loss"] == summary["eval_loss_before"]
    assert {"loss", "learning_rate", "tokens"} <= set(rows[1])
    assert [row["step"] for row in rows if "loss" in row][-1] == 10
    assert not list(out.glob("*.partial"))

    card = (out / "adapter/README.md").read_text()
    assert f"{questions_file}, 80 rows" in card
    assert f"- held-out loss: {summary['eval_loss_before']:.4f} before, {summary['eval_loss_after']:.4f} after" in card
    assert "more information needed" not in card.lower()
    base = AutoModelForCausalLM.from_pretrained(llama)
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    tokens = AutoTokenizer.from_pretrained(out / "adapter")("where was the big cat ?", return_tensors="pt")
    with torch.no_grad():
        assert close(merged(**tokens).logits, adapted(**tokens).logits)


@pytest.mark.slow
def test_the_merged_model_is_that_of_the_merge_command(questions_file, tmp_path):
    """Also where the base is stored in another dtype than it trains in: the files keep theirs."""
    from transformers import AutoModelForCausalLM

    model = write_tiny_llama(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    out = tmp_path / "run"
    training = {"max_steps": 2, "save_strategy": "no"}
    train(recipe_for(model, questions_file, out, merge=True, training=training))
    merge_checkpoint(model, out / "adapter", tmp_path / "merged")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out / "merged", tmp_path / "merged"))
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert all(same_bits(ours[name], tensor, Promise.SAME_PRODUCT) for name, tensor in theirs.items())
    assert (out / "merged" / "merge.json").is_file()
    assert not list(out.glob("*.partial"))


def test_an_output_inside_the_models_folder_cannot_be_merged(questions_file, tmp_path):
    model = write_tiny_llama(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"merge: output .*run lies inside the model's folder .*; choose another"):
        train(recipe_for(model, questions_file, model / "run", merge=True))
    assert not (model / "run").exists()


@pytest.mark.slow
def test_a_model_whose_files_hold_other_tensors_is_merged_as_it_was_loaded(questions_file, tmp_path):
    """Mixtral's files hold every expert by itself, and transformers fuses them; the adapter names the fused tensor."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = tmp_path / "base"
    MixtralForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    out = tmp_path / "run"
    adapter = {"r": 8, "target_modules": None, "target_parameters": ["experts.gate_up_proj"]}
    training = {"max_steps": 2, "save_strategy": "no"}
    train(recipe_for(model, questions_file, out, adapter=adapter, training=training, merge=True))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    tokens = tokenizer("where was the big cat ?", return_tensors="pt")
    with torch.no_grad():
        assert close(merged(**tokens).logits, adapted(**tokens).logits)
    assert not list(out.glob("*.partial"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of the same
def test_what_cannot_be_merged_into_the_files_is_refused_before_the_first_step(questions_file, tmp_path):
    """The files hold one tensor for both embeddings, and the adapter would make them differ."""
    from transformers import LlamaForCausalLM

    tokenizer, model = tiny_tokenizer(), tmp_path / "base"
    config = tiny_config(len(tokenizer))
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    out = tmp_path / "run"
    recipe = recipe_for(model, questions_file, out, adapter={"r": 8, "modules_to_save": ["lm_head"]}, merge=True)
    with pytest.raises(FormatError, match="the base ties its output embedding to the input embedding"):
        train(recipe)
    assert not out.exists()


def test_the_loss_is_on_the_response_only(llama, jsonl, tmp_path):
    """Against transformers' own loss with the prompt's five tokens masked by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = jsonl([{"prompt": "where was the cat ?", "completion": " on the mat ."}] * 4)
    out = tmp_path / "run"
    summary = train(recipe_for(llama, path, out, training={"max_steps": 1}, data=DataRecipe(str(path), eval=1))).summary
    tokens = AutoTokenizer.from_pretrained(llama)("where was the cat ? on the mat .</s>", return_tensors="pt").input_ids
    labels = tokens.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(llama)(input_ids=tokens, labels=labels).loss.item()
    assert math.isclose(summary["eval_loss_before"], want, rel_tol=1e-5)


def test_conversations_are_trained_through_the_chat_template(llama, jsonl, tmp_path):
    talk = [
        {"role": "user", "content": "where was the cat ?"},
        {"role": "assistant", "content": "on the mat ."},
        {"role": "user", "content": "was it red ?"},
        {"role": "assistant", "content": "yes"},
    ]
    path = jsonl([{"messages": talk}] * 8)
    summary = train(
        recipe_for(llama, path, tmp_path / "run", data=DataRecipe(str(path), eval=2), training={"max_steps": 4})
    ).summary
    assert (summary["train_rows"], summary["eval_rows"]) == (6, 2)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_conversations_without_a_chat_template_are_refused_with_the_remedy(jsonl, tmp_path):
    model = write_tiny_llama(tmp_path / "plain", chat_template=None)
    path = jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4)
    recipe = recipe_for(model, path, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"has no chat template; give one with training\.chat_template_path"):
        train(recipe)
    assert not (tmp_path / "run").exists()
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} </s>{% endfor %}")
    recipe.training |= {"chat_template_path": str(template), "max_steps": 1}
    assert train(recipe).summary["steps"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/folder"}, "model /no/such/folder: no such folder"),
        (
            {"model": "nobody/nothing"},
            "model nobody/nothing: no such folder, and not found in the hub's cache .offline",
        ),
        ({"model": __file__}, r"test_train_run\.py: is a file; a folder, a hub id, a \.gguf file or an RWKV"),
        ({"model": "/no/such.gguf"}, "no such GGUF file"),
        ({"adapter": {"r": 0}}, "`r` should be a positive integer value"),
        ({"adapter": {"r": 8, "target_modules": ["q_prj"]}}, "q_pr"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "training: cosin is not a valid SchedulerType"),
        ({"training": {"max_steps": [1]}}, r"training\.max_steps: got \[1\], wanted a whole number"),
        ({"training": {"max_length": 3}}, r"no training row has a token of its answer within training\.max_length 3"),
    ],
)
def test_wrong_input_is_one_clear_line_and_leaves_nothing_behind(llama, questions_file, tmp_path, changes, message):
    with pytest.raises(FlashboneError, match=message) as error:
        train(recipe_for(llama, questions_file, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_of_the_output_is_refused(llama, questions_file):
    with pytest.raises(ConfigError, match="a file is in the way"):
        train(recipe_for(llama, questions_file, questions_file / "run"))


def test_a_diverged_run_stops_with_the_step_and_the_remedy(llama, questions_file, tmp_path):
    recipe = recipe_for(llama, questions_file, tmp_path / "run", training={"learning_rate": 1e30, "max_grad_norm": 0})
    with pytest.raises(NonFiniteError, match=r"step \d+: (eval_)?loss is (nan|inf); lower training.learning_rate"):
        train(recipe)


@pytest.fixture(scope="module")
def albert(tmp_path_factory) -> Path:
    """The pretrained ALBERT of rxnmapper, whose layers share their weights, with a plain tokenizer of its words."""
    from importlib.util import find_spec

    spec = find_spec("rxnmapper")
    if spec is None:
        pytest.skip("rxnmapper, which carries a small ALBERT, is not installed")
    source = Path(spec.submodule_search_locations[0]) / "models/transformers/albert_heads_8_uspto_all_1310k"
    folder = tmp_path_factory.mktemp("albert")
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).symlink_to(source / name)
    words = (source / "vocab.txt").read_text().splitlines()
    word_tokenizer(words, "[PAD]", "[CLS]", "[SEP]", "[UNK]").save_pretrained(folder)
    return folder


def distilbert_recipe(jsonl, folder, **changes):
    """A classifier on a masked language model, whose checkpoint has no pre_classifier."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS.split()]
    base = folder / "base"
    word_tokenizer(words, *words[:4]).save_pretrained(base)
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(words), **sizes)).save_pretrained(base)
    path = jsonl([{"text": f"the {animal}", "label": animal} for animal in ("cat", "dog")] * 8)
    training = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    data = DataRecipe(str(path), eval=str(path))
    return recipe_for(base, path, folder / "run", task="classification", data=data, training=training, **changes)


@pytest.mark.parametrize("targets", ["all-linear", ["attention.query"]])
def test_a_classifier_saves_whatever_its_checkpoint_lacked(jsonl, tmp_path, targets, caplog):
    """Such as DistilBERT's pre_classifier: left out, each load of the base would draw other numbers for it."""
    from flashbone.evaluate.run import Request, evaluate

    recipe = distilbert_recipe(jsonl, tmp_path, adapter={"r": 4, "target_modules": targets})
    with caplog.at_level("INFO", logger="flashbone"):
        summary = train(recipe).summary
    assert f"model {recipe.model}: its checkpoint has no classifier, pre_classifier; trained whole" in caplog.text
    rows = Path(recipe.data.path)
    measured = evaluate(Request(recipe.model, tmp_path / "run/adapter", classification=rows, device="cpu"))
    values = {figure.name: figure.value for figure in measured.evaluations[0].figures}
    assert values["accuracy"] == summary["eval_accuracy_after"]
    assert values["cross-entropy (nats)"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)


def test_a_quantised_classifier_whose_checkpoint_lacks_more_than_the_head_is_refused(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("flashbone.train.trainers.quantized_loading", lambda recipe, dtype: {})  # not installed
    recipe = distilbert_recipe(jsonl, tmp_path, adapter={"r": 4}, quantization={"bits": 4})
    with pytest.raises(ConfigError, match=r"quantization: the checkpoint of .* has no pre_classifier, which"):
        train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_classification_learns_saves_its_head_and_reports_accuracy_and_f1(albert, jsonl, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    groups = {"acid": "C ( = O ) O", "amine": "C N"}
    path = jsonl([{"text": "C " * (1 + i % 5) + groups[name], "label": name} for i in range(30) for name in groups])
    recipe = recipe_for(
        albert,
        path,
        tmp_path / "run",
        task="classification",
        data=DataRecipe(str(path), eval=0.2),
        training={"max_steps": 30, "learning_rate": 1e-3, "save_strategy": False},  # what YAML makes of `no`
    )
    summary = train(recipe).summary
    assert summary["labels"] == ["acid", "amine"]
    assert summary["eval_accuracy_after"] == summary["eval_macro_f1_after"] == 1.0
    assert 0 <= summary["eval_accuracy_before"] <= 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))

    base = AutoModelForSequenceClassification.from_pretrained(albert, num_labels=2)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    with torch.no_grad():
        logits = model(
            **tokenizer(["C C C C C C C ( = O ) O", "C C C C C C C N"], padding=True, return_tensors="pt")
        ).logits
    assert logits.argmax(-1).tolist() == [0, 1]


def test_peak_memory_and_rates_carry_their_units_in_their_names():
    assert set(peak_memory()) == {"peak_mib", "peak_of"}
