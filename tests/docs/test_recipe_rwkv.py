"""docs/recipes/rwkv.md is followed from top to bottom, with a small file under the name of a released one."""

import json
import subprocess
import sys

import pytest
import torch

from flashbone.cli import main
from helpers.comparison import Promise, relative_error, same_bits
from helpers.pages import ROOT, Block, PageRun
from helpers.rwkv import reference_logits, write_rwkv

PAGE = "docs/recipes/rwkv.md"
BASE = "RWKV-x070-World-1.5B-v3-20250127-ctx4096.pth"
# Few steps of a large rate, and pieces shorter than a row.
SMALL = {"num_train_epochs: 1": "max_steps: 3", "2.0e-5": "1.0e-2", "chunk_ctx: 1024": "chunk_ctx: 8"}
pytest.importorskip("rwkv", reason="rwkv, which brings the vocabulary, is not installed; `make test` does it")


class Followed(PageRun):
    """Python that names its file runs in a process of its own, as the page asks."""

    asked = ""

    def python(self, block: Block) -> None:
        if block.text.startswith("# ask.py"):
            done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            self.asked = done.stdout
        else:
            super().python(block)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The page in a folder of its own: the run, and what it printed."""
    folder = tmp_path_factory.mktemp("rwkv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rwkv(folder / BASE, 7, hidden=64, head=16, layers=2, vocabulary=65536)
        yield Followed(PAGE, replaced=SMALL).run(), folder


@pytest.mark.slow
def test_the_page_is_followed_to_its_end(followed):
    run, folder = followed
    assert run.ran.count("bash") == 4
    logged = [json.loads(line) for line in (folder / "runs/rwkv/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses[-1] < losses[0]
    base, merged = (torch.load(folder / name, weights_only=True) for name in (BASE, "merged.pth"))
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in base.items()] == [
        (name, tensor.shape, tensor.dtype) for name, tensor in merged.items()
    ]


@pytest.mark.slow
def test_the_package_answers_what_the_model_here_does_and_the_base_does_not(followed):
    run, folder = followed
    ids, length = run.names["answer"][0], run.names["prompt"].input_ids.shape[1]
    ours = run.names["tokenizer"].decode(ids[length:], skip_special_tokens=True)
    assert len(ids) > length
    assert run.asked.endswith(f"\n{ours}\n")
    tokens = ids[:length].tolist()
    jobs = [(folder / name, tokens) for name in ("merged.pth", BASE)]
    (_, theirs), (_, plain) = reference_logits(7, jobs, folder / "reference")
    with torch.no_grad():
        got = run.names["model"](ids[None, :length]).logits[0]
    assert relative_error(got, theirs) < 2e-5
    assert relative_error(plain, theirs) > 1e-2


@pytest.mark.slow
def test_merging_the_file_of_rwkv_peft_gives_the_same_model(followed):
    _, folder = followed
    ours, theirs = (torch.load(folder / name, weights_only=True) for name in ("merged.pth", "from-theirs.pth"))
    base = torch.load(folder / BASE, weights_only=True)
    assert all(same_bits(theirs[name], ours[name], Promise.SAME_PRODUCT) for name in base)
    assert not torch.equal(ours["blocks.0.ln1.weight"], base["blocks.0.ln1.weight"])
    assert not torch.equal(ours["blocks.1.ffn.key.weight"], base["blocks.1.ffn.key.weight"])


@pytest.mark.slow
def test_the_figures_of_the_table_are_what_inspect_counts(tmp_path, capsys):
    from flashbone.rwkv import Rwkv7Config

    sizes = {"decay_rank": 96, "rate_rank": 96, "value_rank": 64, "gate_rank": 256}
    Rwkv7Config(hidden_size=2048, num_hidden_layers=24, **sizes).save_pretrained(tmp_path)
    columns = {}
    for variant in ("bone", "bat-row"):
        flags = ["--adapter.variant", variant, "--adapter.r", "64", "--tokens", "4096", "--json"]
        assert main(["inspect", str(tmp_path), *flags]) == 0
        report = json.loads(capsys.readouterr().out)
        columns |= {variant: report["costs"], "lora": report["lora"]}
    assert columns["lora"]["r"] == 32
    costs = [columns[name] for name in ("bone", "bat-row", "lora")]
    rows = {
        "trained numbers": [f"{cost['trainable_parameters']:,}" for cost in costs],
        "base weights, GiB": [f"{report['base_bytes'] / 2**30:.2f}"] * 3,
        "adapter, gradients, AdamW, MiB": [
            f"{(cost['weight_bytes'] + cost['state_bytes']) / 2**20:,.0f}" for cost in costs
        ],
        "kept for backward by the adapter, MiB": [f"{cost['activation_bytes'] / 2**20:,.0f}" for cost in costs],
    }
    text = (ROOT / PAGE).read_text()
    assert [row for row, cells in rows.items() if f"| {row} | {' | '.join(cells)} |" not in text] == []
