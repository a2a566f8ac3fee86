"""`flashbone train [CONFIG.yaml] [--dotted.field value ...]`: fine-tune, then print the results."""

import argparse
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flashbone import floors
from flashbone.cli.configured import separate
from flashbone.cli.places import expand
from flashbone.cli.terminal import set_up_notices
from flashbone.errors import ConfigError, FlashboneError
from flashbone.files.outputs import write_text

if TYPE_CHECKING:
    from flashbone.train.recipe import Recipe
    from flashbone.train.rewards import Reward

VALUED = ("--save-recipe", "--processes", "--reward")
OPTIONS = ("--resume", "--dry-run", "--json", "--help", *VALUED)

EPILOG = """\
CONFIG.yaml:
  model: path-or-hub-id          # folder, hub id, .gguf file, or an RWKV model's .pth file
  task: sft                      # sft | dpo | kto | reward | grpo (docs/preferences.md) | classification
  data:                          # or a list of such mappings, each with a weight: docs/training.md
    path: train.jsonl            # .json, .jsonl, .csv, .parquet, .bin/.idx, or a dataset's hub id
    eval: 0.1                    # held out: a share, a number of rows, a file, or null
    format: auto                 # messages | sharegpt | alpaca | prompt-completion | text | ... (docs/training.md)
    columns: {prompt: query}     # our name: the data's name
    split: train[:5000]
  adapter: {variant: bone, r: 64, target_modules: all-linear}     # any field of BoneConfig
  training: {max_steps: 200, learning_rate: 2.0e-4}               # any field of TRL's SFTConfig, or of the task's
  output: runs/first             # adapter/, merged/, metrics.jsonl, summary.json, loss.png, checkpoint-*/
  init_adapter: path             # go on with this adapter, in any format of the family; then leave adapter out
  merge: true                    # also write the merged model
  monitor: true                  # log the rotations of the variant orthogonal, and draw them
  samples: 3                     # show answers to held-out prompts before and after; 0 for none
  seed: 42
  quantization: {bits: 4}        # the base in few bits, by bitsandbytes
  rwkv: {chunk_ctx: 512, l2_wrap: false, train_parts: [ln, time]}  # of RWKV models: docs/rwkv.md

Every field can be given on the command line too: --training.max_steps 20 --adapter.r 16 --output runs/second
They can do without a file: flashbone train --model M --data.path train.jsonl --output runs/first
"""


def run(argv: list[str]) -> int:
    """Parse, train, print the summary on stdout; notices and progress go to stderr."""
    ours, overrides = separate(argv, OPTIONS, VALUED)
    parser = make_parser()
    options = parser.parse_args(ours)
    if options.config is None and not overrides:
        parser.error("wanted CONFIG.yaml, or --model, --data.path and --output")
    expand(options, "config", "save_recipe")
    floors.check("train")
    set_up_notices()

    from flashbone.train.recipe import load_recipe

    recipe = load_recipe(options.config, overrides)
    save = functools.partial(_save, recipe, options.save_recipe)
    save(only_check=True)
    reward = _reward(recipe, options.reward)
    if options.processes is not None:
        from flashbone.cli.launching import check_processes, launch
        from flashbone.train.arguments import trains_on_cpu

        on_cpu = trains_on_cpu(recipe)
        check_processes(options.processes, on_cpu)
        if options.processes > 1:
            return launch(["train", *_without(ours, "--processes"), *overrides], options.processes, on_cpu)

    from flashbone.cli.dry_run import dry_run
    from flashbone.train.report import plot_losses, plot_rotations, print_summary
    from flashbone.train.run import train

    try:
        if options.dry_run:
            result = dry_run(recipe, options.json, reward)
        else:
            result = train(recipe, options.resume, save, reward)
        save()
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


def _without(words: list[str], option: str) -> list[str]:
    """The words without an option and its value."""
    at = next((number for number, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    return words[:at] + words[at + (1 if "=" in "".join(words[at : at + 1]) else 2) :]


def _reward(recipe: "Recipe", named: str | None) -> "Reward | None":
    """The function that rewards answers, if one is named.

    Raises:
        ConfigError: the task has no rewards, or there is no such function.
    """
    from flashbone.train.rewards import load_reward

    if named is None:
        return None
    if recipe.task != "grpo":
        raise ConfigError(f"--reward: is for task grpo, not {recipe.task}; leave it out")
    return load_reward(named)


def _save(recipe: "Recipe", file: Path | None, only_check: bool = False) -> None:
    """Write the recipe to a file, once and in the main process.

    Raises:
        ConfigError: the file exists, and holds something else.
    """
    from flashbone.train.recipe import recipe_text

    if file is None or os.environ.get("RANK", "0") != "0":
        return
    text = recipe_text(recipe)
    if file.exists() and not (file.is_file() and file.read_bytes() == text.encode()):
        raise ConfigError(f"--save-recipe {file}: exists already, and is another recipe; choose another name")
    if not (only_check or file.exists()):
        write_text(file, text)


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
        usage="flashbone train [CONFIG.yaml] [--dotted.field value ...] [--resume | --dry-run] [--reward FILE.py:NAME]"
        " [--save-recipe FILE] [--processes N] [--json]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="the recipe; flags can take its place")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    either.add_argument(
        "--dry-run", action="store_true", help="read, check and tokenise everything, say what would be learned, and end"
    )
    parser.add_argument("--reward", metavar="FILE.py:FUNCTION", help="of task grpo: rewards answers; the file is run")
    parser.add_argument(
        "--processes", metavar="N", type=int, help="train in N processes here: each on a GPU, or on CPUs"
    )
    parser.add_argument("--save-recipe", metavar="FILE", type=Path, help="write file and flags as one recipe")
    parser.add_argument("--json", action="store_true", help="print the summary, or the dry run, as JSON")
    return parser
