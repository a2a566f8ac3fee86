"""Write the shorter questions of GSM8K (openai/gsm8k, MIT) with their worked answers, as rows of prompt and completion.

python -m examples.compare.gsm8k FOLDER, which holds train.jsonl and test.jsonl with `question` and `answer`.
"""

import re
import sys
from pathlib import Path

from examples.offline import read_jsonl, whole_folder, write_jsonl

CACHE = Path(".cache/gsm8k")
LONGEST = 300  # characters of a question and its answer: of 7,473 rows and 1,319 the shorter ones, quick on a CPU


def short_rows(rows: list[dict]) -> list[dict]:
    """Rows without the calculator's marks, such as <<48/2=24>>, that are short enough."""
    made = [{"prompt": row["question"], "completion": re.sub(r"<<.*?>>", "", row["answer"])} for row in rows]
    return [row for row in made if len(row["prompt"]) + len(row["completion"]) <= LONGEST]


def main(folder: Path) -> int:
    """Write both parts."""
    with whole_folder(CACHE) as written:
        for name in ("train.jsonl", "test.jsonl"):
            write_jsonl(written / name, short_rows(read_jsonl(folder / name)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
