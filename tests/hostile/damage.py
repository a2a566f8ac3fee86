"""Damage of a file that follows from a number. Coarse: bytes changed, cut, repeated. Fine: a file that is whole, with
one odd value, tensor, row or field in it, which the commands read as far as they can."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load, save

TEXTS = [
    *("\x1b[2J\x1b[1;1Hflashbone: all is well", "a\nflashbone merge: error: none", "\u202eevil", "\x00", "../../out"),
    *("/etc/passwd", "(a+)+$", ".*" * 30, "x" * 5000, "{{ 9 * 9 }}", "!!python/object/apply:os.system", "\ud800"),
    *("{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}", "{{ 'a' * 10 ** 9 }}"),
    *("<!-- flashbone: end -->", "class_path", "nan", "1e999", "-0", "\u2028", "", "all-linear"),
    *("q\u0301", "\u00e9", "e\u0301", "CON", "=1+1", "<script>alert(1)</script>", "q_proj", "0", "true", "\ufeff"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**9), 0.5, float("nan"), float("inf"), [], {}, [[]]),
    *([0] * 70, ["a"] * 3, {"a": {"a": {"a": 1}}}, {"class_path": "os.system"}, [None], {"": ""}),
    *(2, 3, 1e-9, 1e9, -0.5, 65_537, 10**7),
]
TEMPLATES = [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ messages[0]['content'] | upper }} {{ bos_token }}",
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}{{ strftime_now('%Y') }}",
    "{% if messages | length > 1 %}{{ raise_exception('two turns') }}{% endif %}{{ messages[0].content }}",
    "{% for m in messages %}{{ m.content.split()[99] }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}",
    "{% set x = namespace(n=0) %}{% for m in messages %}{% set x.n = x.n + 1 %}{{ x.n / 0 }}{% endfor %}",
    "{% for m in messages %}{% for n in range(20000) %}{% endfor %}{{ m.content }}{% endfor %}",
    "",
]


def damaged(data: bytes, name: str, seed: int) -> bytes:
    """The bytes of the file of that name after its damage: coarse for every fourth number."""
    dice = random.Random(seed)
    change = _FINE.get(Path(name).suffix)
    if change is not None and seed % 4:
        return change(data, dice)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        data = dice.choice((_bytes, _bytes, _cut, _repeated, _text, _header))(data, dice)
    return data


def _odd(content: Any, dice: random.Random) -> Any:
    """JSON or YAML with another value somewhere: mostly one like it, else any."""
    places = list(_places(content))
    if not places:
        return dice.choice(VALUES)
    holder, key = dice.choice(places)
    change = dice.randrange(8)
    if change == 0:
        holder[key] = dice.choice(TEXTS)
    elif change == 1:
        holder[key] = dice.choice(VALUES)
    elif change == 2 and isinstance(holder, dict):
        holder[dice.choice(TEXTS)] = holder.pop(key)
    elif change == 3 and isinstance(holder, dict):
        del holder[key]
    elif change == 4 and isinstance(holder, dict):
        holder[f"_{key}"] = dice.choice((0, None, "", [], False))
    else:
        holder[key] = _near(holder[key], dice)
    return content


def _near(value: Any, dice: random.Random) -> Any:
    """A value of the same kind, or what it is in another kind."""
    if isinstance(value, bool):
        return dice.choice((not value, str(value).lower(), int(value)))
    if isinstance(value, int | float):
        return dice.choice((value + 1, value - 1, 2 * value, value / 2, -value, float(value), str(value), [value]))
    if isinstance(value, str):
        return dice.choice((value.upper(), f"{value} ", value[:-1], value + value[-1:], value[::-1], [value]))
    if isinstance(value, list):
        return dice.choice((value[::-1], value[:-1], value + value[-1:], value[:1], [*value, None]))
    return value if value is None else dict(list(value.items())[::-1])


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def _json(data: bytes, dice: random.Random) -> bytes:
    return json.dumps(_odd(json.loads(data), dice)).encode()


def _yaml(data: bytes, dice: random.Random) -> bytes:
    content = _odd(yaml.safe_load(data), dice)
    try:
        return yaml.safe_dump(content, allow_unicode=True).encode()
    except UnicodeEncodeError:
        return json.dumps(content).encode()


def _rows(data: bytes, dice: random.Random) -> bytes:
    rows = [json.loads(line) for line in data.splitlines()]
    number = dice.randrange(len(rows))
    rows[number] = _odd(rows[number], dice)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _cells(data: bytes, dice: random.Random) -> bytes:
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = dice.choice(rows)
    row[dice.randrange(len(row))] = dice.choice((*TEXTS, *map(str, VALUES[:12]), *row))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _columns(data: bytes, dice: random.Random) -> bytes:
    """A parquet file with a column of another type, name or content."""
    import pandas as pd

    table = pd.read_parquet(io.BytesIO(data))
    texts = list(table["text"])
    columns: list[Any] = [range(8), np.linspace(0, 1, 8), [None] * 8, [texts] * 8, [t.encode() for t in texts]]
    columns += [[{"role": "user", "content": t}] for t in texts], [*texts[1:], None], ["", *texts[1:]]
    columns += [*texts[:-1], dice.choice(TEXTS[:6])], pd.Categorical(texts), [True] * 8
    kept = dice.choice(({"text": texts}, {}, {"prompt": texts, "completion": texts}))
    table = pd.DataFrame(
        {**kept, dice.choice(("text", "label", "messages", "input_ids", "x\x1b")): dice.choice(columns)}
    )
    target = io.BytesIO()
    table.to_parquet(target)
    return target.getvalue()


def _safetensors(data: bytes, dice: random.Random) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in _tensors(load(data), dice).items()})


def _pickled(data: bytes, dice: random.Random) -> bytes:
    target = io.BytesIO()
    torch.save(_tensors(torch.load(io.BytesIO(data), weights_only=True), dice), target)
    return target.getvalue()


def _tensors(tensors: dict[str, torch.Tensor], dice: random.Random) -> dict[str, torch.Tensor]:
    """The tensors with one of another shape, type, name or content."""
    name = dice.choice(sorted(tensors))
    tensor = tensors[name]
    change = dice.randrange(8)
    if change == 0:
        return {key: value for key, value in tensors.items() if key != name}
    if change == 1:
        other = dice.choice(sorted(tensors))
        return tensors | {name: tensors[other].clone(), other: tensor.clone()}
    if change == 2:
        text = dice.choice(TEXTS).encode("utf-8", "replace").decode()
        return tensors | {dice.choice((text, name.upper(), f"{name}.x", name.replace("0", "7"))): tensor.clone()}
    values = (float("nan"), float("inf"), 1e30, -1e-30, 0.0)
    if change == 3 and tensor.is_floating_point():
        odd = tensor.clone()
        odd.view(-1)[dice.randrange(odd.numel())] = dice.choice(values)
        return tensors | {name: odd}
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn)
    shapes = (tensor.reshape(-1), tensor[None], tensor[:1], tensor[..., :1], tensor.t() if tensor.ndim == 2 else tensor)
    odd = tensor.to(dice.choice(kinds[:3] if change > 5 else kinds)) if change > 4 else dice.choice(shapes)
    return tensors | {name: odd.clone()}


def _template(data: bytes, dice: random.Random) -> bytes:
    return dice.choice(TEMPLATES).encode()


_FINE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json,
    ".yaml": _yaml,
    ".jsonl": _rows,
    ".csv": _cells,
    ".parquet": _columns,
    ".safetensors": _safetensors,
    ".bin": _pickled,
    ".pth": _pickled,
    ".jinja": _template,
}


def _header(data: bytes, dice: random.Random) -> bytes:
    """Another value in JSON whose other bytes stay: the file's, or that of a safetensors header."""
    length = int.from_bytes(data[:8], "little")
    is_header = 8 < length < len(data) - 8 and data[8:9] == b"{"
    try:
        text = json.dumps(_odd(json.loads(data[8 : 8 + length] if is_header else data), dice)).encode()
    except ValueError:
        return _bytes(data, dice)
    return len(text).to_bytes(8, "little") + text + data[8 + length :] if is_header else text


def _bytes(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 2, 8, 64)) if data else 0):
        # The beginning and the end hold what says how the rest is read.
        near = min(len(data), 200)
        place = dice.choice((dice.randrange(len(data)), dice.randrange(near), len(data) - 1 - dice.randrange(near)))
        changed[place] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
    return bytes(changed)


def _cut(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data) + 1)
    return data[:place] if dice.random() < 0.5 else data[place:][:2000]


def _repeated(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data) + 1)
    piece = data[start : start + dice.choice((1, 10, 100))]
    return data[:start] + piece * dice.choice((2, 100, 2000)) + data[start:]


def _text(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data) + 1)
    return data[:start] + dice.choice(TEXTS).encode("utf-8", "surrogatepass") + data[start:]
