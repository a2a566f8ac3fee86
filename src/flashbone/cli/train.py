"""`flashbone train CONFIG.yaml [--dotted.field value ...]`: fine-tune, then print the results."""

import argparse
import json

from flashbone import floors
from flashbone.cli.configured import separate
from flashbone.cli.places import expand
from flashbone.cli.terminal import set_up_notices
from flashbone.errors import FlashboneError

OPTIONS = ("--resume", "--dry-run", "--json", "--help")

EPILOG = """\
CONFIG.yaml:
  model: path-or-hub-id          # folder, hub id, .gguf file, or an RWKV model's .pth file
  task: sft                      # sft | classification
  data:                          # or a list of such mappings, each with a weight: docs/training.md
    path: train.jsonl            # .json, .jsonl, .csv, .parquet, .bin/.idx, or a dataset's hub id
    eval: 0.1                    # held out: a share, a number of rows, a file, or null
    format: auto                 # messages | sharegpt | alpaca | prompt-completion | text | ... (docs/training.md)
    columns: {prompt: query}     # our name: the data's name
    split: train[:5000]
  adapter: {variant: bone, r: 64, target_modules: all-linear}     # any field of BoneConfig
  training: {max_steps: 200, learning_rate: 2.0e-4}               # any field of SFTConfig or TrainingArguments
  output: runs/first             # adapter/, merged/, metrics.jsonl, summary.json, loss.png, checkpoint-*/
  init_adapter: path             # go on with this adapter, in any format of the family; then leave adapter out
  merge: true                    # also write the merged model
  monitor: true                  # log the rotations of the variant orthogonal, and draw them
  samples: 3                     # show answers to held-out prompts before and after; 0 for none
  seed: 42
  quantization: {bits: 4}        # the base in few bits, by bitsandbytes
  rwkv: {chunk_ctx: 512, l2_wrap: false, train_parts: [ln, time]}  # of RWKV models: docs/rwkv.md

Every field can be given on the command line too: --training.max_steps 20 --adapter.r 16 --output runs/second
"""


def run(argv: list[str]) -> int:
    """Parse, train, print the summary on stdout; notices and progress go to stderr."""
    ours, overrides = separate(argv, OPTIONS)
    options = make_parser().parse_args(ours)
    expand(options, "config")
    floors.check("train")
    set_up_notices()

    from flashbone.train.recipe import load_recipe

    recipe = load_recipe(options.config, overrides)

    from flashbone.cli.dry_run import dry_run
    from flashbone.train.report import plot_losses, plot_rotations, print_summary
    from flashbone.train.run import train

    try:
        result = dry_run(recipe, options.json) if options.dry_run else train(recipe, resume=options.resume)
    except (FlashboneError, OSError, SystemExit, KeyboardInterrupt):  # what ends with a code of its own
        leave_processes()
        raise
    leave_processes()
    if result is None or not result.is_main:
        return 0
    figures = [plot_losses(result.folder.metrics, result.folder.path / "loss.png")]
    figures += [path] if (path := plot_rotations(result.folder.metrics, result.folder.path / "rotation.png")) else []
    if options.json:
        print(json.dumps(result.summary, indent=2))
    else:
        print_summary(result.summary, result.folder.path, figures)
    return 0


def leave_processes() -> None:
    """Leave the group of launched processes, if there is one.

    A thread of gloo that ends a work while the interpreter closes cannot take the interpreter's lock, and aborts the
    process ("terminate called without an active exception"); the launcher then stops the others.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone train",
        description="Fine-tune a model with a Bone adapter as a YAML file says.",
        usage="flashbone train CONFIG.yaml [--resume | --dry-run] [--json] [--dotted.field value ...]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    either.add_argument(
        "--dry-run", action="store_true", help="read, check and tokenise everything, say what would be learned, and end"
    )
    parser.add_argument("--json", action="store_true", help="print the summary, or the dry run, as JSON")
    return parser
