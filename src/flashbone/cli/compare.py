"""`flashbone compare CONFIG.yaml [--dotted.field value ...]`: train methods side by side, then say which did best."""

import argparse
import json
import os
from pathlib import Path

from flashbone import floors
from flashbone.cli.configured import separate
from flashbone.cli.places import expand
from flashbone.cli.terminal import set_up_notices
from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import read_json_lines

OPTIONS = ("--plan", "--report", "--retry-failed", "--json", "--help")

EPILOG = """\
CONFIG.yaml:
  model: path-or-hub-id          # folder, hub id, .gguf file, or an RWKV model's .pth file
  task: sft                      # sft | classification
  data:                          # as in `flashbone train`, and
    path: train.jsonl
    eval: 0.1                    # held out: chooses the learning rates and draws the curves
    test: test.jsonl             # scored once at the end of each run: a share, a number of rows, or a file
  methods:                       # bone bat-row bat-col mini orthogonal lora rslora dora pissa olora oft miss; at PEFT's
    - bone                       # size or yours: boft hra vera ia3; as bounds: full (fine-tuning) and linear (probing)
    - {method: lora, lora_alpha: 16, learning_rates: [1.0e-3, 2.0e-3], label: LoRA with alpha 16}
  budget: {method: bone, r: 64}  # all adapters get as many parameters as this one, or a number
  target_modules: all-linear
  learning_rates: [3.0e-4, 1.0e-3, 3.0e-3]   # all are tried by each method, with the first seed
  seeds: [0, 1, 2]               # the others follow at the rate that did best on the held-out rows
  training: {max_steps: 200}     # any field of SFTConfig or TrainingArguments, the same for all methods
  metric: auto                   # loss (sft), accuracy (classification), or exact_match (as of GSM8K)
  answers: {max_new_tokens: 256, batch_size: 16}   # with exact_match
  jobs: 1                        # runs at once, each on a GPU of its own, or with its share of the threads; or ray
  output: runs/compare           # results.jsonl, report.html, *.png, recipes/*.yaml, runs/*/

Every field can be given on the command line too: --seeds '[0]' --methods '[bone, lora]' --output runs/second
A comparison that was stopped resumes where it was when it is started again.
"""


def run(argv: list[str]) -> int:
    """Parse, run what is missing, report; progress goes to stderr."""
    ours, overrides = separate(argv, OPTIONS)
    options = make_parser().parse_args(ours)
    expand(options, "config")
    floors.check("train")
    set_up_notices()

    from flashbone.compare.config import load_comparison

    comparison = load_comparison(options.config, overrides)
    if options.plan:
        return _plan(comparison, options.json)

    from flashbone.compare.report import print_comparison, write_report

    file = Path(comparison.output) / "results.jsonl"
    if options.report:
        if not file.is_file():
            raise ConfigError(f"output {comparison.output}: no results.jsonl there yet; run the comparison first")
    else:
        from flashbone.compare.commands import Origin
        from flashbone.compare.run import compare

        file = compare(comparison, Origin(options.config, tuple(overrides)), options.retry_failed)
    written = write_report(file, file.parent)
    rows = read_json_lines(file)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_comparison(file)
        for path in [file, *written]:
            print(os.path.relpath(path))
    methods = [row for row in rows if row["kind"] == "method"]
    if methods and all(row["status"] == "failed" for row in methods):
        raise FlashboneError(f"all {len(methods)} methods failed; {methods[0]['method']}: {methods[0]['error']}")
    return 0


def _plan(comparison, as_json: bool) -> int:
    """Print the sizes and the number of runs."""
    from flashbone.compare.run import plan
    from flashbone.printing import Console, Table

    budget, methods = plan(comparison)
    runs = sum(len(method.listed.learning_rates) + len(comparison.seeds) - 1 for method in methods if method.size)
    if as_json:
        rows = [
            {"method": method.listed.label, **(vars(method.size) if method.size else {"error": method.error})}
            for method in methods
        ]
        print(json.dumps({"budget": budget.parameters, "runs": runs, "methods": rows}, indent=2))
        return 0
    table = Table(
        title=f"{runs} runs; budget {budget.parameters:,} parameters {budget.origin and f'({budget.origin})'}"
    )
    for name in ("method", "size", "parameters", "off budget", "learning rates"):
        table.add_column(name, justify="left" if name in ("method", "size") else "right")
    for method in methods:
        rates = " ".join(f"{rate:g}" for rate in method.listed.learning_rates)
        cells = [method.listed.label, method.error or "", "", "", rates]
        if method.size is not None:
            off = "bound" if method.size.off_budget is None else f"{100 * method.size.off_budget:+.1f} %"
            mark = "" if method.size.matched or off == "bound" else " (unmatched)"
            cells[1:4] = [method.size.size, f"{method.size.adapter_parameters:,}", off + mark]
        table.add_row(*cells)
    Console().print(table)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone compare",
        description="Train methods side by side on one model and its data, and report which did best at what cost.",
        usage="flashbone compare CONFIG.yaml [--plan | --report] [--retry-failed] [--json] [--dotted.field value ...]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the comparison")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="only print the sizes and the number of runs")
    only.add_argument("--report", action="store_true", help="only write the report again, from results.jsonl")
    parser.add_argument("--retry-failed", action="store_true", help="repeat runs that failed")
    parser.add_argument("--json", action="store_true", help="print results.jsonl as one JSON list")
    return parser
