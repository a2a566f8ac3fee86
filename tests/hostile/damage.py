"""Damage of a file that follows from a number: bytes changed, cut, repeated; JSON with other values; hostile text."""

import json
import random
from typing import Any

TEXTS = [
    *("\x1b[2J\x1b[1;1Hflashbone: all is well", "a\nflashbone merge: error: none", "\u202eevil", "\x00", "../../out"),
    *("/etc/passwd", "(a+)+$", ".*" * 30, "x" * 5000, "{{ 9 * 9 }}", "!!python/object/apply:os.system", "\ud800"),
    *("{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}", "{{ 'a' * 10 ** 9 }}"),
    *("<!-- flashbone: end -->", "class_path", "nan", "1e999", "-0", "\u2028", "", "all-linear"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**9), 0.5, float("nan"), float("inf"), [], {}, [[]]),
    *([0] * 70, ["a"] * 3, {"a": {"a": {"a": 1}}}, {"class_path": "os.system"}, [None], {"": ""}),
]


def damaged(data: bytes, seed: int) -> bytes:
    """The file's bytes after one to four changes."""
    dice = random.Random(seed)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        data = dice.choice((_json, _json, _bytes, _bytes, _cut, _repeated, _text))(data, dice)
    return data


def _json(data: bytes, dice: random.Random) -> bytes:
    """Another value somewhere in a JSON object: the file's, or that of a safetensors header."""
    length = int.from_bytes(data[:8], "little")
    is_header = 8 < length < len(data) - 8 and data[8:9] == b"{"
    head = data[8 : 8 + length] if is_header else data
    try:
        content = json.loads(head)
    except ValueError:
        return _bytes(data, dice)
    places = list(_places(content))
    if not places:
        return _bytes(data, dice)
    holder, key = dice.choice(places)
    change = dice.randrange(4)
    if change == 0:
        holder[key] = dice.choice(TEXTS)
    elif change == 1:
        holder[key] = dice.choice(VALUES)
    elif change == 2 and isinstance(holder, dict):
        holder[dice.choice(TEXTS)] = holder.pop(key)
    else:
        holder[key] = [holder[key]] * dice.choice((1, 2, 50))
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :] if is_header else text


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def _bytes(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 2, 8, 64)) if data else 0):
        # The beginning and the end hold what says how the rest is read.
        near = min(len(data), 200)
        place = dice.choice((dice.randrange(len(data)), dice.randrange(near), len(data) - 1 - dice.randrange(near)))
        changed[place] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
    return bytes(changed)


def _cut(data: bytes, dice: random.Random) -> bytes:
    return (
        data[: dice.randrange(len(data) + 1)] if dice.random() < 0.5 else data[dice.randrange(len(data) + 1) :][:2000]
    )


def _repeated(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data) + 1)
    piece = data[start : start + dice.choice((1, 10, 100))]
    return data[:start] + piece * dice.choice((2, 100, 2000)) + data[start:]


def _text(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data) + 1)
    return data[:start] + dice.choice(TEXTS).encode("utf-8", "surrogatepass") + data[start:]
