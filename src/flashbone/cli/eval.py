"""`flashbone eval MODEL [--adapter A]`: measure a model's quality, each figure with its interval of 95%."""

import argparse
import json
from pathlib import Path

from flashbone.cli import hub
from flashbone.cli.asking import MODEL_HELP, at_least, with_one_model
from flashbone.cli.places import expand
from flashbone.cli.terminal import rows_bar, set_up_notices
from flashbone.evaluate.bases import is_adapter

EPILOG = """\
examples:
  flashbone eval MODEL --adapter runs/first/adapter --exact-match gsm8k/test.jsonl --output results/first
  flashbone eval MODEL --tasks arc_easy,my_task --include-path my_tasks --limit 200
  flashbone eval MODEL --adapter runs/news/adapter --classification news/test.jsonl
  flashbone eval MODEL --perplexity held_out.jsonl --json

A run with --output that was killed goes on where it was, when the same command is given again.
"""

_PLACES = ("model", "adapter", "vocabulary", "output", "exact_match", "classification", "perplexity", "include_path")


def run(argv: list[str]) -> int:
    """Measure, print a table or JSON on stdout; bad input raises a FlashboneError, a bad command line SystemExit."""
    parser = make_parser()
    args = with_one_model(parser, argv)
    expand(args, *_PLACES)
    _check(parser, args)
    set_up_notices()

    from flashbone.evaluate.results import print_table
    from flashbone.evaluate.run import Request, evaluate
    from flashbone.files.records import to_json

    given = {key: value for key, value in vars(args).items() if key not in ("json", "adapter")}
    adapter = None if args.adapter is None else hub.folder(args.adapter)
    results = evaluate(Request(**given, adapter=adapter), rows_bar)
    if args.json:
        print(json.dumps(json.loads(to_json(results)), indent=2))  # in ASCII, for any terminal
    else:
        print_table(results)
    return 0


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, as a usage error."""
    generative = [args.tasks, args.exact_match, args.perplexity]
    if not any([*generative, args.classification]):
        parser.error("nothing to measure; give --tasks, --exact-match, --classification or --perplexity")
    if args.classification and any(generative):
        parser.error("--classification needs a classifier, the others a language model; run it by itself")
    if args.merge and args.adapter is None and not is_adapter(args.model):
        parser.error("--merge needs an --adapter")
    belong = [
        ("--include-path", args.include_path, "--tasks", args.tasks),
        ("--num-fewshot", args.num_fewshot, "--tasks", args.tasks),
        ("--apply-chat-template", args.apply_chat_template, "--tasks", args.tasks),
        ("--prompt", args.prompt, "--exact-match", args.exact_match),
        ("--no-chat-template", not args.chat_template, "--exact-match", args.exact_match),
        ("--labels", args.labels, "--classification", args.classification),
        ("--columns", args.columns, "a file", args.exact_match or args.classification or args.perplexity),
    ]
    for option, value, other, there in belong:
        if value is not None and value is not False and value != () and value != {} and not there:
            parser.error(f"{option} needs {other}")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("got no name, wanted names with commas between them")
    return names


def columns(text: str) -> dict[str, str]:
    """Pairs of OURS=THEIRS."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted OURS=THEIRS,... as in question=query,answer=response")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _template(text: str) -> str:
    text = text.replace("\\n", "\n")  # a shell passes no line break by itself
    if text != "alpaca" and "{question}" not in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted 'alpaca' or a text with {{question}} in it")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashbone eval",
        description="Measure a model's quality, with or without an adapter; each figure has its interval of 95%.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("--adapter", metavar="A", help="adapter of any format that flashbone reads, or of PEFT's other methods")
    add("--merge", action="store_true", help="put the adapter into the weights first, in memory")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the model (fp32 on a CPU, bf16 on a GPU)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    add("--vocabulary", metavar="FILE", help="the tokens of an RWKV model")
    add("--limit", type=at_least(1), metavar="N", help="only the first N rows of each file and task")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="rows at once (8)")
    add("--output", type=Path, metavar="DIR", help="also write results.json there, and answers as they come")
    add("--json", action="store_true", help="print the results as one JSON object")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--exact-match", type=Path, metavar="FILE", help="questions with answers, as GSM8K's")
    what.add_argument("--tasks", type=_names, default=(), metavar="T,...", help="tasks of lm-evaluation-harness")
    what.add_argument("--classification", type=Path, metavar="FILE", help="texts with labels")
    what.add_argument("--perplexity", type=Path, metavar="FILE", help="texts, or rows as `flashbone train` reads them")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--columns", type=columns, default={}, metavar="O=T,...", help="our column names to the file's")
    add("--prompt", type=_template, metavar="T", help="'alpaca', or a text with {question} in it (the question)")
    add("--no-chat-template", dest="chat_template", action="store_false", help="questions as plain text")
    add("--max-new-tokens", type=at_least(1), default=512, metavar="N", help="longest answer (512)")
    add("--include-path", type=Path, metavar="DIR", help="folder with task files of your own")
    add("--num-fewshot", type=at_least(0), metavar="N", help="solved examples before each question (the task's)")
    add("--apply-chat-template", action="store_true", help="questions of tasks in the tokenizer's chat template")
    add("--labels", type=_names, default=(), metavar="L,...", help="the classes, in the order of the head's outputs")
    add("--max-length", type=at_least(2), metavar="N", help="tokens of a row (512; perplexity: 1024)")
    return parser
