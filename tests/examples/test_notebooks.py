"""The notebooks, cell by cell, on tiny models: they run, learn, agree with themselves and draw what the docs show."""

import importlib.util
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from helpers.stand_ins import write_tiny_bert
from helpers.tiny_llama import questions, write_tiny_llama

pytestmark = pytest.mark.slow

matplotlib = pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.py"))
IMAGES = ROOT / "docs/images/notebooks"
TOPICS = {"sport": "the cat ran under the tree", "tech": "the dog sat on a mat"}
EXPECTED = {"first_fine_tune", "many_adapters", "what_blocks_learned"}


# The format.


def cells(path: Path) -> list[tuple[bool, int, str]]:
    """(is it text, line, source) of each cell of a file in percent format."""
    found: list[tuple[bool, int, list[str]]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("# %%"):
            assert line in ("# %%", "# %% [markdown]"), f"{path.name}:{number}: {line!r} opens no cell"
            found.append((line.endswith("[markdown]"), number, []))
        else:
            assert found, f"{path.name}:{number}: stands before the first cell"
            found[-1][2].append(line)
    return [(is_text, number, "\n".join(lines)) for is_text, number, lines in found]


def figures_in(text: str) -> list[str]:
    """Names of the figures that a text shows."""
    return re.findall(r"^# !\[[^\]]+\]\(\.\./\.\./docs/images/notebooks/(\S+)\)$", text, re.M)


def shown_figures(path: Path) -> list[str]:
    """Names of the figures that the text cells of a notebook show."""
    return [name for is_text, _, source in cells(path) if is_text for name in figures_in(source)]


def test_there_are_three_notebooks():
    assert {path.stem for path in NOTEBOOKS} == EXPECTED


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_in_percent_format_and_starts_with_its_title(path):
    found = cells(path)
    is_text, number, source = found[0]
    assert (is_text, number) == (True, 1)
    assert re.match(r"# # \w", source)
    for is_text, number, source in found:
        assert source.strip(), f"{path.name}:{number}: an empty cell"
        if is_text:
            assert all(line.startswith("#") for line in source.strip().splitlines()), f"{path.name}:{number}"
        else:
            compile(source, path.name, "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_figures_that_are_shown_were_drawn_before_and_are_small(path):
    shown, drawn = shown_figures(path), []
    for is_text, number, source in cells(path):
        if is_text:
            assert set(figures_in(source)) <= set(drawn), f"{path.name}:{number}: shown before it is drawn"
        else:
            drawn += re.findall(r'savefig\(OUT / "(\S+)"\)', source)
    assert shown == drawn
    for name in shown:
        data = (IMAGES / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 120_000, name


def test_no_committed_figure_is_left_over():
    assert {path.name for path in IMAGES.iterdir()} == {name for path in NOTEBOOKS for name in shown_figures(path)}


# The cells.


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, a tiny BERT, chats and news."""
    folder = tmp_path_factory.mktemp("small")
    write_tiny_llama(folder / "llama")
    write_tiny_bert(
        folder / "bert", sorted({word for text in TOPICS.values() for word in text.split()}), intermediate_size=72
    )
    for part in ("chat", "news"):
        (folder / part).mkdir()
    for name, count in (("train", 32), ("test", 8)):
        roles = [(("user", row["prompt"]), ("assistant", row["completion"].strip())) for row in questions(count)]
        chats = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in roles]
        news = [{"text": text, "label": topic} for topic, text in TOPICS.items()] * (count // 2)
        for part, rows in (("chat", chats), ("news", news)):
            (folder / part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """Run every cell of a notebook, with small constants instead of those of its settings; its namespace."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def of(name: str, **constants) -> dict:
        constants |= {"OUT": tmp_path / "out"}
        path = ROOT / f"examples/notebooks/{name}.py"
        namespace = {"__name__": name}
        for is_text, number, source in cells(path):
            if not is_text:
                exec(compile("\n" * number + source, str(path), "exec"), namespace)
                if re.search(r"^OUT = ", source, re.M):
                    assert set(constants) <= set(namespace)
                    namespace |= constants
        assert {file.name for file in constants["OUT"].glob("*.png")} == set(shown_figures(path))
        return namespace

    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield of
    matplotlib.pyplot.close("all")
    matplotlib.use(before)


@pytest.mark.slow
def test_the_first_fine_tune_learns_and_merges(run, small):
    settings = {"MODEL": small / "llama", "CHATS": small / "chat", "HELD_OUT": 4}
    found = run("first_fine_tune", **settings, BLOCK_SIZE=8, STEPS=8, LEARNING_RATE=1e-2, QUESTIONS=["where is it ?"])
    steps, losses = zip(*found["held_out_loss"], strict=True)
    assert steps == (0, 2, 4, 6, 8)
    assert losses[-1] < losses[0] - 0.1
    assert sum(found["rows_after"]) < sum(found["rows_before"])
    assert found["difference"] < 1e-4
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"):
        assert (found["OUT"] / file).stat().st_size > 0


@pytest.mark.slow
def test_what_the_blocks_learned_is_what_the_text_says(run, small):
    settings = {"MODEL": small / "bert", "NEWS": small / "news", "HELD_OUT": 8}
    name = "encoder.layer.1.attention.self.query"
    found = run("what_blocks_learned", **settings, BLOCK_SIZE=8, STEPS=12, BATCH=8, LOOK_AT=name)
    assert set(found["losses"]) == {"bone", "bat-row", "orthogonal", "LoRA"}
    assert all(losses[-1] < losses[0] for losses in found["losses"].values())
    assert found["ranks"]["bone"] == 8
    assert found["ranks"]["LoRA"] == 4
    assert min(found["ranks"]["bat-row"], found["ranks"]["orthogonal"]) > 8
    assert all(change > 0 for changes in found["relative"].values() for change in changes.values())
    assert all(grid.shape == (2, 6) and grid.min() > 0 for grid in found["block_rms"].values())
    assert 0 < found["largest_angle"] < 180
    blocks = found["adapted_layers"](found["models"]["orthogonal"])
    variant = blocks[name].bone_variant["default"]
    assert found["angles"][name][0] == pytest.approx(variant.angle_deg(blocks[name].bone_block["default"]), 1e-4)


@pytest.mark.slow
def test_many_adapters_answer_in_one_batch_as_they_do_alone(run, small):
    settings = {"MODEL": small / "llama", "CHATS": small / "chat", "NEWS": small / "news", "HELD_OUT": 3}
    sizes = {"BLOCK_SIZE": 8, "STEPS": 6, "BATCH": 4, "ROUNDS": 2, "NEW_TOKENS": 2, "LEARNING_RATE": 1e-2}
    found = run("many_adapters", **settings, **sizes)
    assert all(found["losses"][task][task] < found["losses"]["none"][task] for task in ("chat", "topic", "shout"))
    assert found["mixed_difference"] < 1e-4
    assert not torch.allclose(found["by_adapter"]["chat"], found["by_adapter"]["__base__"], atol=1e-3)
    assert found["lora_difference"] < 1e-4
    for task in ("chat", "topic"):
        assert found["by_scale"][task][0] == pytest.approx(found["losses"]["none"][task], rel=1e-5)
        assert found["by_scale"][task][2] == pytest.approx(found["losses"][task][task], rel=1e-5)
        assert found["by_share"][task][0] == pytest.approx(found["losses"]["chat"][task], rel=1e-5)
        assert found["by_share"][task][-1] == pytest.approx(found["losses"]["topic"][task], rel=1e-5)
    assert list(found["model"].peft_config) == ["chat", "topic", "shout"]
    assert {"SERVE.md", "adapter_model.safetensors"} <= {p.name for p in (found["OUT"] / "chat-for-vllm").iterdir()}
    assert set(found["medians"]) == {"base", "one adapter", "mixed batch", "one by one"}


def test_a_notebook_without_its_model_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in NOTEBOOKS:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        with pytest.raises(SystemExit, match=r"is not there; run in .*-m examples\.(demo|classification)\.prepare$"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert list(tmp_path.iterdir()) == []
