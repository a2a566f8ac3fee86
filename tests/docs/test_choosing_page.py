"""The guide to the variants: its figures are those of the kept rows, and its claims hold.

python tests/docs/test_choosing_page.py rewrites the figures.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flashbone import BoneConfig, variants
from flashbone.compare.config import ComparisonConfig
from flashbone.conversion.engines import ENGINES
from flashbone.train.arguments import trainer_arguments
from flashbone.train.recipe import DataRecipe, Recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "choosing.md"
RESULTS = ROOT / "benchmarks" / "results"
METHODS = ("bone", "mini", "bat-row", "bat-col", "orthogonal", "lora")
HEADS = [*(f"`{name}`" for name in METHODS[:-1]), "LoRA"]


@dataclass(frozen=True)
class Cost:
    """A line of the table: which rows it shows."""

    what: str
    benchmark: str
    part: str
    shape: dict[str, Any]
    metric: str = "time_ratio"
    device: str = "AMD EPYC, 2 threads"
    others: dict[str, Any] = field(default_factory=dict)

    def rows(self, methods: tuple[str, ...] = METHODS) -> dict[str, dict[str, Any]]:
        """The row of each method that was measured; there is no second one."""
        wanted = {"benchmark": self.benchmark, "part": self.part, "metric": self.metric, "device": self.device}
        wanted |= {"shape": self.shape, "dtype": "float32", "r": 64, "adapters": 1} | self.others
        lines = (RESULTS / f"{self.benchmark}.jsonl").read_text().splitlines()
        found: dict[str, dict[str, Any]] = {}
        for row in map(json.loads, lines):
            if row["method"] in methods and all(row[name] == value for name, value in wanted.items()):
                assert row["method"] not in found, f"{self.what}: two rows of {row['method']}"
                found[row["method"]] = row
        return found


def layer(tokens: int, into: int, out: int) -> dict[str, int]:
    return {"tokens": tokens, "in": into, "out": out}


def model(batch: int, seq: int, name: str = "smollm2") -> dict[str, Any]:
    return {"model": name, "batch": batch, "seq": seq}


MIXED = {"adapters": 8}
COSTS = (
    Cost("layer 4096 x 4096, 512 tokens, forward and backward", "layer", "shapes", layer(512, 4096, 4096)),
    Cost("layer 1536 x 1536, 1024 tokens, the same", "layer", "shapes", layer(1024, 1536, 1536)),
    Cost("that, r = 16", "layer", "r", layer(1024, 1536, 1536), others={"r": 16}),
    Cost("that, r = 128", "layer", "r", layer(1024, 1536, 1536), others={"r": 128}),
    Cost("training step of SmolLM2-135M, all linear layers, 2 x 256 tokens", "step", "main", model(2, 256)),
    Cost("its memory, as the system sees it, MiB", "memory", "main", model(2, 256), "above_floor_mib"),
    Cost("its memory, without the allocator's holes, MiB", "memory", "live", model(2, 256), "above_floor_mib"),
    Cost("decoding one token, layer 4096 x 4096", "decode", "main", layer(1, 4096, 4096)),
    Cost("SmolLM2, 32 rows of 16 tokens, forward", "mixed", "prefill", model(32, 16)),
    Cost("that, rows in turn with 8 adapters", "mixed", "prefill", model(32, 16), others=MIXED),
    Cost("SmolLM2, 32 rows of one token, forward", "mixed", "decode", model(32, 1)),
    Cost("that, rows in turn with 8 adapters", "mixed", "decode", model(32, 1), others=MIXED),
    Cost(
        "BERT-base, 8 x 128 tokens, attention outputs, forward",
        "forward",
        "main",
        model(8, 128, "bert-base"),
        device="AMD EPYC, 1 thread",
    ),
)


def cell(cost: Cost, row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['median']:.0f}" if cost.metric.endswith("mib") else f"{row['median']:.2f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def costs() -> str:
    lines = []
    for cost in COSTS:
        rows = cost.rows()
        lines.append([cost.what, *(cell(cost, rows.get(name)) for name in METHODS)])
    return table(["measured", *HEADS], lines)


LLAMA_2_7B = (
    [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
)  # (out, in) of a decoder layer's linears, 32 times


def trained(name: str, mini_r: int = 64) -> int:
    shapes = [variants.get(name).block_shape(out, into, 64, mini_r) for out, into in LLAMA_2_7B]
    return 32 * sum(torch.Size(shape).numel() for shape in shapes)


def sizes() -> str:
    head = [*HEADS[:-1]]
    head[1] = "`mini`, mini_r = 64"
    head[4] = "`orthogonal`"
    lora = 32 * sum(35 * (out + into) for out, into in LLAMA_2_7B)
    numbers = [trained(name) for name in METHODS[:-1]] + [lora]
    row = ["trained numbers", *(f"{number:,}" for number in numbers)]
    return table(["Llama-2-7B", *head, "LoRA, rank 35"], [row])


PARTS: dict[str, Callable[[], str]] = {"sizes": sizes, "costs": costs}


def filled(text: str) -> str:
    """The page with its generated parts as the rows and the code give them."""
    for name, part in PARTS.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        assert text.count(start) == text.count(end) == 1, name
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n{part()}\n\n{end}{rest.partition(end)[2]}"
    return text


def test_the_tables_are_what_the_kept_rows_and_the_code_say():
    assert PAGE.read_text() == filled(PAGE.read_text()), "run python tests/docs/test_choosing_page.py"


def test_a_changed_figure_would_show():
    text = PAGE.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| decoding one token"))
    changed = row.replace(cell(COSTS[7], COSTS[7].rows()["bone"]), "1.00", 1)
    assert changed != row
    assert filled(text.replace(row, changed)) == text


def test_what_is_said_of_the_figures_is_so():
    ratios = [{name: row["median"] for name, row in cost.rows().items()} for cost in COSTS]
    step, resident, alive = ratios[4:7]
    assert max(step["bone"], step["mini"]) < step["bat-row"] < step["bat-col"]
    for memory in (resident, alive):
        assert all(memory["bone"] < memory[name] for name in ("bat-row", "bat-col", "lora"))
    assert resident["mini"] < resident["bone"]
    assert 0.9 < ratios[3]["bone"] / ratios[2]["bone"] < 1.1
    assert [round(ratios[i]["bat-col"]) for i in (9, 11)] == [3, 6]


RANKS = {"bone": 3, "mini": 2, "bat-row": 12, "bat-col": 12, "orthogonal": 12}


@pytest.mark.parametrize("name", RANKS)
def test_the_rank_of_a_change_is_what_the_table_says(name):
    variant, W = variants.get(name), torch.randn(15, 12, dtype=torch.float64)
    # An even block of `orthogonal`: the skew part of an odd one has an eigenvalue 0, whose direction is not turned.
    r = 4 if name == "orthogonal" else 3
    block = torch.randn(variant.block_shape(15, 12, r, 2), dtype=torch.float64)
    rank = int(torch.linalg.matrix_rank(variant.delta(W, block)))
    assert rank == RANKS[name]
    assert (variant.factors(block, 15, 12) is not None) == (name in ("bone", "mini"))
    assert variant.reads_weight == (name == "bat-col")
    assert variant.delta_depends_on_weight == (name not in ("bone", "mini"))


def test_sizes_and_rates_are_those_of_their_sources():
    text = PAGE.read_text()

    def recipe(name: str) -> dict[str, Any]:
        return yaml.safe_load((ROOT / "examples" / name).read_text())

    assert BoneConfig().r == 64
    rates = {"paper_metamath.yaml": 2e-5, "rwkv/metamath.yaml": 2e-5}
    rates |= {"demo/demo.yaml": 1e-3, "classification/classify.yaml": 5e-3}
    for name, rate in rates.items():
        assert recipe(name)["training"]["learning_rate"] == rate
        shown = f"{rate:.0e}".replace("e-0", "e-")
        assert re.search(rf"^\| {shown}.*`examples/{name}` \|$", text, re.M), name
    assert recipe("classification/classify.yaml")["adapter"]["r"] == 32
    assert recipe("demo/demo.yaml")["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    plain = Recipe("", DataRecipe("rows.jsonl"), "out", "classification", training={"use_cpu": True})
    assert trainer_arguments(plain).learning_rate == 2e-4
    comparison = ComparisonConfig(model="", data=None, output="")  # pyright: ignore[reportArgumentType]
    assert comparison.learning_rates == [3e-4, 1e-3, 3e-3]
    assert ENGINES["vllm"].ranks == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_the_drawing_is_what_its_script_draws():
    script = ROOT / "docs" / "images" / "variants.py"
    spec = importlib.util.spec_from_file_location("draw_variants", script)
    assert spec is not None
    assert spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    sys.modules["draw_variants"] = drawing  # where dataclasses look their module up
    spec.loader.exec_module(drawing)
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == drawing.svg()
    assert [panel.name for panel in drawing.PANELS] == ["bone", "mini", "bat-row", "bat-col", "orthogonal"]
    assert {panel.name for panel in drawing.PANELS if panel.reads} == {
        name for name in variants.VARIANTS if variants.get(name).delta_depends_on_weight
    }


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
