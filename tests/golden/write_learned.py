"""Write learned.txt: a row of each layout as the model sees it, with [[brackets]] around what is learned.

    PYTHONPATH=tests:tests/train:src python tests/golden/write_learned.py

Look at the difference before you commit it: it is what users' models learn.
"""

from pathlib import Path

from layout_rows import LAYOUT_ROWS

from flashbone.train.data.formats import open_examples
from flashbone.train.data.tokens import bracketed, tokenise
from helpers.tiny_llama import byte_tokenizer

FILE = Path(__file__).with_name("learned.txt")


def learned_text() -> str:
    """The file's content."""
    tokenizer = byte_tokenizer()
    parts = []
    for name, layout in LAYOUT_ROWS.items():
        for example in open_examples(iter([("d:1", layout.row)]), "sft", "d", layout.asked).examples:
            rows = [bracketed(row, tokenizer) for row in tokenise(example, tokenizer)]
            parts.append("\n".join([f"=== {name}", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(learned_text(), encoding="utf-8")
