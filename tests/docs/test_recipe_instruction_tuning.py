"""docs/recipes/instruction_tuning.md, from top to bottom, on a tiny Llama and conversations that it can learn."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file

from helpers.comparison import Promise, same_bits
from helpers.pages import PageRun
from helpers.tiny_llama import questions, write_tiny_llama

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


class Killed(PageRun):
    """`--resume` finds the run as a kill between its last two checkpoints leaves it; and has to come to the same."""

    def command(self, words: list[str], where: str) -> None:
        if "--resume" not in words:
            super().command(words, where)
            return
        run = Path("runs/chat")
        want, adapter = losses(run), load_file(run / "adapter/adapter_model.safetensors")
        last = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
        for left in (last, run / "adapter"):
            shutil.rmtree(left)
        (run / "summary.json").unlink()
        super().command(words, where)
        assert losses(run) == want
        again = load_file(run / "adapter/adapter_model.safetensors")
        assert all(same_bits(again[key], value, Promise.RESUMED) for key, value in adapter.items())
        self.names["resumed"] = len(want)


def write_chats(path: Path) -> None:
    """Conversations of one turn and of two; questions that come in several of them."""
    turns = [(row["prompt"], row["completion"].strip()) for row in questions(4)]
    turns += [
        (f"did the {animal} sat under the tree ?", f"{word} .") for animal, word in (("cat", "yes"), ("dog", "no"))
    ]
    turns += [(f"what was {colour} ?", f"the {colour} mat .") for colour in ("red", "blue", "big", "small")]
    with path.open("w") as file:
        for number in range(60):
            said = [turns[number % 10]] + ([turns[number % 7]] if number % 3 == 0 else [])
            messages = [
                {"role": role, "content": text}
                for two in said
                for role, text in zip(("user", "assistant"), two, strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # TRL's own default
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    write_tiny_llama(tmp_path / BASE)
    config = tmp_path / BASE / "config.json"  # the page's rows have up to 512 tokens
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 512'))
    write_chats(tmp_path / "chats.jsonl")
    run = Killed("docs/recipes/instruction_tuning.md").run()
    assert set(run.ran) == {"python", "bash", "yaml", "json"}
    assert run.names["resumed"] >= 5

    first = [
        {json.loads(line)["messages"][0]["content"] for line in Path(f"{n}.jsonl").read_text().splitlines()}
        for n in ("train", "test")
    ]
    assert first[0]
    assert first[1]
    assert not first[0] & first[1]
    summary = json.loads(Path("runs/chat/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    before, after = (
        json.loads(Path(f"results/{name}/results.json").read_text())["evaluations"][0]["figures"][0]["value"]
        for name in ("before", "after")
    )
    assert after < before
    assert (Path("chat-model") / "tokenizer.json").exists()
