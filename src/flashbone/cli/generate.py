"""`flashbone generate MODEL (--prompt TEXT | FILE)`: answers to prompts, one row for one row."""

import argparse
import json
import sys
import time
from pathlib import Path

from flashbone import floors
from flashbone.cli.asking import add_decoding, add_model, at_least, decoding_of, model_of
from flashbone.cli.eval import columns
from flashbone.cli.places import expand
from flashbone.cli.terminal import rows_bar, set_up_notices
from flashbone.errors import LINES, escaped
from flashbone.evaluate.bases import is_adapter

EPILOG = """\
examples:
  flashbone generate MODEL --adapter runs/first/adapter --prompt "Where was the cat?"
  flashbone generate runs/first/adapter questions.jsonl --output answers.jsonl
  flashbone generate MODEL --adapter a=runs/a/adapter --adapter b=runs/b/adapter mixed.jsonl

Rows are read as `flashbone train` reads them, and may lack their answers. Each comes back as it was, with the columns
generated and generated_tokens. A column adapter chooses who answers a row: a name, or null for the base alone.
A run with --output that was killed goes on where it was, when the same command is given again.
"""


def run(argv: list[str]) -> int:
    """Generate; the answers go to stdout or into --output, everything else to stderr."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)  # FILE may come after options
    if (args.file is None) == (args.prompt is None):
        parser.error("give FILE or --prompt TEXT, one of the two")
    if args.file is not None and is_adapter(args.file):
        parser.error(f"{args.file} is an adapter, not rows; give it as --adapter {args.file}")
    expand(args, "file", "output")
    floors.check("train")
    set_up_notices()

    from flashbone.generation.run import Prompts, generate

    request = Prompts(
        model_of(args),
        args.file,
        args.prompt,
        args.output,
        decoding_of(args),
        args.system,
        args.use_template,
        args.columns,
        args.limit,
        args.batch_size,
    )
    began = time.monotonic()
    rows = generate(request, rows_bar)
    if args.output is not None:
        tokens = sum(row["generated_tokens"] for row in rows)
        took = f"{time.monotonic() - began:.1f} s"
        print(f"flashbone generate: {len(rows)} rows, {tokens} tokens, {took}: {args.output}", file=sys.stderr)
    elif args.prompt is not None:
        text = rows[0]["generated"]
        print(escaped(text, LINES) if sys.stdout.isatty() else text)
    else:
        for row in rows:
            print(json.dumps(row))  # in ASCII, for any terminal
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone generate",
        description="Have a model answer prompts, with any of several adapters or without.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model(parser)
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="rows with prompts: .jsonl, .json, .csv or .parquet")
    add("--prompt", metavar="TEXT", help="one prompt in place of a file")
    add("--output", type=Path, metavar="OUT.jsonl", help="write the rows there, and go on there after a kill")
    add("--columns", type=columns, default={}, metavar="O=T,...", help="our column names to the file's")
    add("--limit", type=at_least(1), metavar="N", help="only the first N rows")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="rows at once (8)")
    add("--no-chat-template", dest="use_template", action="store_false", help="give texts to the model as they are")
    add_decoding(parser, seed=0)
    return parser
