"""The report of a dry run on the terminal: rows by source, columns, lengths, steps, memory, and marked examples."""

from collections import Counter

from rich.text import Text

from flashbone.errors import visible
from flashbone.printing import Console
from flashbone.train.plan import Plan, Shown

BARS = 10  # of the histogram
WIDTH = 40  # columns of its longest bar
LONGEST = 2000  # characters of an example that are shown
OF_A_PIECE = 400  # of them, of what is learned or is not, without a break: begin and end
LEARNED = "bold green"


def print_plan(plan: Plan, memory: dict[str, int] | None, note: str) -> None:
    """Print the report on stdout.

    Args:
        plan: What the run would do.
        memory: Bytes of a training step by what needs them; None where that is not known.
        note: What was counted, or why nothing was.
    """
    console = Console()
    console.print(_rows(plan), soft_wrap=True)
    for kind, names in plan.columns.items():
        console.print(f"columns {kind}: {', '.join(map(visible, names)) or 'none'}")
    console.print(_lengths(plan))
    trained, total = plan.parameters["trainable_parameters"], plan.parameters["total_parameters"]
    console.print(f"steps: {plan.steps:,}")
    console.print(f"trained parameters: {trained:,} of {total:,} ({plan.parameters['trainable_percent']:.3g} %)")
    console.print(_memory(plan, memory, note))
    for number, example in enumerate(plan.examples, 1):
        console.print(f"\nexample {number}; what is learned is {'green' if _colours(console) else 'in [[brackets]]'}:")
        console.print(_marked(example, _colours(console)), soft_wrap=True)


def _rows(plan: Plan) -> Text:
    """What becomes of the rows of each source, in lines that fit a narrow terminal."""
    text = Text()
    for name, source in plan.rows.items():
        text.append(f"{visible(name)} ({source.format})\n")
        text.append(f"  {source.read:,} rows read, {source.kept:,} kept, {source.cut:,} cut; ")
        text.append(f"{source.held_out:,} held out, {source.learned:,} learned in an epoch\n")
        for reason, count in source.dropped.items():
            text.append(f"  {count:,} dropped: {visible(reason)}\n")
    return text


def _lengths(plan: Plan) -> Text:
    """A histogram of the lengths of all rows."""
    lengths: Counter[int] = Counter()
    for source in plan.rows.values():
        lengths.update(source.lengths)
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    step = max(1, -(-(longest - shortest + 1) // BARS))
    bars = Counter({(length - shortest) // step: 0 for length in lengths})
    for length, count in lengths.items():
        bars[(length - shortest) // step] += count
    most = max(bars.values(), default=1)
    text = Text("\ntokens of a row, as cut\n")
    for number in range(max(bars, default=-1) + 1):
        first = shortest + number * step
        names = f"{first:,}" if step == 1 else f"{first:,} to {min(first + step - 1, longest):,}"
        text.append(f"{names:>19}  {'█' * -(-bars[number] * WIDTH // most)} {bars[number]:,}\n")
    return text


def _memory(plan: Plan, memory: dict[str, int] | None, note: str) -> str:
    if memory is None:
        return f"memory: not counted: {note}"
    names = {
        "base_bytes": "base",
        "weight_bytes": "adapter",
        "state_bytes": "gradients and AdamW",
        "activation_bytes": "kept by the adapter for backward",
    }
    parts = ", ".join(f"{name} {memory[key] / 2**20:,.1f}" for key, name in names.items())
    return (
        f"memory: {memory['training_bytes'] / 2**20:,.1f} MiB at {plan.tokens:,} tokens a step ({parts}), without what"
        f" the base keeps of them{note}"
    )


def _colours(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None


def _marked(example: Shown, colours: bool) -> Text:
    pieces = example.pieces or [(example.text, False), *((f" {piece}", True) for piece in example.learned)]
    text = Text()
    for piece, is_learned in pieces:
        if len(piece) > OF_A_PIECE:
            piece = f"{piece[: OF_A_PIECE // 2]} … {piece[-OF_A_PIECE // 2 :]}"
        if is_learned and not colours:
            piece = f"[[{piece}]]"
        text.append(piece, LEARNED if is_learned else "")
    if len(text) > LONGEST:
        text.truncate(LONGEST, overflow="ellipsis")
    return text
