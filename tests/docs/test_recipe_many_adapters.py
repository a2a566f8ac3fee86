"""docs/recipes/many_adapters.md is followed from top to bottom, and its loop is asked by many threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.pages import ROOT, run_page
from helpers.tiny_llama import write_tiny_llama

PAGE = "docs/recipes/many_adapters.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = {"STEPS, RATE = 30, 1e-3": "STEPS, RATE = 25, 5e-3"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    (folder / BASE).mkdir(parents=True)
    write_tiny_llama(folder / BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield run_page(PAGE, replaced=SMALL).names


@pytest.mark.slow
def test_each_adapter_gives_its_own_answer_and_the_base_none_of_them(names):
    for user, answer in names["ANSWERS"].items():
        assert names["alone"][user].split() == answer.split()
    assert len(set(names["alone"].values())) == 4


@pytest.mark.slow
def test_many_threads_get_the_answers_of_their_own_adapters(names):
    service, model, question = names["Service"](rows=5), names["model"], names["QUESTION"]
    users = ["carol", "bob", "nobody", "alice", "carol", "bob"] * 4
    wanted = names["alone"] | {"alice": names["alone"]["bob"]}  # swapped

    changing = threading.Lock()  # one change at a time

    def ask(place: int):
        if place % 6 == 5:  # a change, which waits for the batch
            with changing:
                model.load_adapter("adapters/carol", f"new-{place}")
                model.delete_adapter(f"new-{place}")
        return service.ask(users[place], question)

    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(ask, range(len(users))))
    for user, future in zip(users, asked, strict=True):
        if user == "nobody":
            with pytest.raises(KeyError, match="nobody"):
                future.result(timeout=60)
        else:
            assert future.result(timeout=60).split() == wanted[user].split()


@pytest.mark.slow
def test_a_batch_that_fails_gives_its_error_to_those_who_wait_and_the_loop_goes_on(names, monkeypatch):
    service = names["Service"]()
    monkeypatch.setattr(names["tokenizer"], "padding_side", "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        service.ask("bob", names["QUESTION"]).result(timeout=60)
    monkeypatch.undo()
    assert service.ask("bob", names["QUESTION"]).result(timeout=60) == names["alone"]["bob"]


@pytest.mark.slow
def test_the_bytes_of_an_adapter_are_r_times_the_outputs_in_fp32(names):
    outputs = 2 * (32 + 16 + 16 + 32 + 72 + 72 + 32)  # of the tiny model's two blocks
    model = names["model"]
    assert list(model.peft_config) == ["alice", "bob", "carol"]
    blocks = [p for key, p in model.named_parameters() if key.endswith(".bone_block.bob")]
    assert sum(p.numel() * p.element_size() for p in blocks) == 4 * 64 * outputs


def test_the_figures_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.rows import RESULTS, read
    from benchmarks.tables.targets import outcomes

    page, benchmarks = ((ROOT / name).read_text() for name in (PAGE, "docs/benchmarks.md"))
    ratios = {found.target.claim: f"{found.median:.3f}" for found in outcomes(read(RESULTS / "mixed.jsonl"))}
    for tokens, label in (("16 tokens", "16 tokens (a prompt)"), ("one token", "one token (decoding)")):
        order = ("bone", "mini", "bat-row", "orthogonal", "bat-col")
        cells = [ratios[f"mixed batch, 32 rows of {tokens}: {name}, 8 adapters / one"] for name in order]
        assert f"| {label} | {' | '.join(cells)} |" in page
    assert "parameters 38.0 MiB" in " ".join(benchmarks.split())
    for method, ms in (("flashbone bone", 244), ("PEFT LoRA", 548)):
        assert f"{method} {ms} ms " in benchmarks
        assert f"{ms} ms" in page
