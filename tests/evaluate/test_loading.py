"""Adapters of every format on the model that is evaluated, against the outputs that they have elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flashbone import BoneConfig
from flashbone.conversion import convert
from flashbone.errors import ConfigError, FormatError, ShapeError
from flashbone.evaluate.exact_match import exact_matches
from flashbone.evaluate.loading import load_language_model, recorded_labels, recorded_max_length
from flashbone.evaluate.perplexity import perplexity
from flashbone.files.records import to_json
from flashbone.rwkv import from_pth
from flashbone.train.recipe import DataRecipe, Recipe
from helpers.comparison import close
from helpers.rwkv import write_rwkv

IDS = torch.tensor([[7, 8, 9, 10, 11]])


def randomised(model, config, folder) -> torch.Tensor:
    """Save a random adapter, and return the logits that the model has with it."""
    adapted = get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "bone_" in name or "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return logits(adapted.eval())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plain(llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        BoneConfig(r=8, target_modules=["q_proj", "down_proj"]),
        BoneConfig(r=8, variant="bat-row", target_modules=["q_proj", "down_proj"]),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    ],
    ids=["bone", "bat-row", "lora"],
)
def test_a_folder_of_peft_gives_the_adapted_outputs_merged_or_not(llama, tmp_path, config, merge):
    want = randomised(plain(llama), config, tmp_path / "a")
    model, _ = load_language_model(str(llama), tmp_path / "a", torch.float32, "cpu", merge=merge)
    assert close(logits(model), want, torch.float32)
    assert hasattr(model, "peft_config") is not merge
    assert not torch.allclose(want, logits(plain(llama)), atol=1e-2)


@pytest.mark.parametrize("to", ["miss", "lora", "peft"])
def test_each_format_that_is_converted_to_gives_the_same_outputs(llama, tmp_path, to):
    want = randomised(plain(llama), BoneConfig(r=8, target_modules=["q_proj", "v_proj"]), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to, base=llama)
    model, _ = load_language_model(str(llama), tmp_path / "b", torch.float32, "cpu")
    assert close(logits(model), want, torch.float32)


@pytest.mark.filterwarnings("ignore:Could not find a config file in .*pth:UserWarning")  # peft looks for one
def test_an_rwkv_models_pth_with_an_adapters_pth_answers_and_predicts(tmp_path):
    base = write_rwkv(tmp_path / "base.pth", 7, vocabulary=260, layers=2)
    vocabulary = tmp_path / "bytes.txt"
    vocabulary.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    config = BoneConfig(r=8, target_modules=["key", "value"], modules_to_save=["ln1"])
    want = randomised(from_pth(base), config, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "adapter.pth", "rwkv-peft")
    arguments = (str(base), tmp_path / "adapter.pth", torch.float32, "cpu")
    model, tokenizer = load_language_model(*arguments, vocabulary=str(vocabulary))
    assert close(logits(model), want, torch.float32)
    rows = [("How are you", "1"), ("Hm", "1"), ("Two words and more", "1")]
    batched = exact_matches(model, tokenizer, rows, max_new_tokens=5, batch_size=3)
    assert batched == exact_matches(model, tokenizer, rows, max_new_tokens=5, batch_size=1)
    found = perplexity(model, tokenizer, [{"text": "How are you?"}, {"text": "Hm."}])
    with torch.no_grad():
        texts = [torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]]) for text in ("How are you?", "Hm.")]
        losses = [float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in texts]
    assert found.figures[0].value == pytest.approx(sum(losses) / sum(ids.shape[1] - 1 for ids in texts), rel=1e-5)


def test_an_adapter_of_another_model_is_refused(llama, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    other = LlamaConfig(vocab_size=34, **sizes)
    for name, config in (("bone", BoneConfig(r=8)), ("lora", LoraConfig(r=4))):
        config.target_modules = ["q_proj", "down_proj"]
        randomised(LlamaForCausalLM(other), config, tmp_path / name)
        with pytest.raises((FormatError, ShapeError), match="q_proj"):
            load_language_model(str(llama), tmp_path / name, torch.float32, "cpu")


def test_missing_tensors_of_a_lora_are_no_warning_but_an_error(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    randomised(plain(llama), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"does not fit the model, .*missing adapter keys"):
        load_language_model(str(llama), tmp_path / "a", torch.float32, "cpu")


def test_what_is_no_adapter_or_a_classifiers_is_refused(llama, tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        load_language_model(str(llama), tmp_path / "nowhere", torch.float32, "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="empty"):
        load_language_model(str(llama), tmp_path / "empty", torch.float32, "cpu")
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    get_peft_model(classifier, BoneConfig(r=8, task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "c"
    )
    with pytest.raises(ConfigError, match="was trained for the task SEQ_CLS; use flashbone eval --classification"):
        load_language_model(str(llama), tmp_path / "c", torch.float32, "cpu")


def test_the_adapters_own_tokenizer_is_taken(llama, tmp_path):
    from transformers import AutoTokenizer

    randomised(plain(llama), BoneConfig(r=8, target_modules=["q_proj"]), tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }} yes"
    tokenizer.save_pretrained(tmp_path / "a")
    _, found = load_language_model(str(llama), tmp_path / "a", torch.float32, "cpu")
    assert found.chat_template == tokenizer.chat_template


def test_a_run_says_its_classes_to_adapters_and_checkpoints_in_it(tmp_path, caplog):
    sizes = dict.fromkeys(("train_rows", "eval_rows", "steps", "trainable_parameters", "total_parameters", "tokens"), 1)
    seconds = dict.fromkeys(("epochs", "trainable_percent", "train_s", "peak_mib"), 1.5)
    unknown = dict.fromkeys(("block_size", "train_loss", "rotation", "tokens_per_s"))
    words = dict.fromkeys(("model", "task", "variant", "peak_of", "device"), "a")
    summary = {**sizes, **seconds, **unknown, **words, "processes": 1, "versions": {}, "labels": ["b", "a"]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    recipe = Recipe("m", DataRecipe("d"), "o", training={"max_length": 96})
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    for name in ("adapter", "checkpoint-4"):
        (tmp_path / name).mkdir()
        assert recorded_labels(tmp_path / name) == ["b", "a"]
        assert recorded_max_length(tmp_path / name) == 96
    assert recorded_labels(tmp_path / "summary.json") == recorded_labels(Path("/")) == recorded_labels(None) == []
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"labels": "ab", "steps": None}))
    caplog.clear()
    assert recorded_labels(tmp_path / "adapter") == []  # of another program, or damaged
    (tmp_path / "recipe.json").write_text("[]")
    assert recorded_max_length(tmp_path / "adapter") is None
    summaries, recipes = (record.getMessage() for record in caplog.records)
    assert "labels: got 'ab', wanted a list" in summaries
    assert summaries.endswith("; it is ignored")
    assert "recipe.json: wanted a JSON object, got a list; it is ignored" in recipes
