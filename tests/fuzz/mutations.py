"""Seeded mutations of files: of their bytes, of the data in them, and of what kind of file they are."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    0.5,
    3.7,
    -1e308,
    1e308,
    float("nan"),
    float("inf"),
    10**7,
    2**31,
    2**63,
    10**40,
    "",
    "x",
    "../../../etc/passwd",
    "\ud800",
    "\x00",
    "é" * 3000,
    [],
    [[]],
    {},
    [0] * 1000,
    {"": {}},
    [None],
    "nan",
    "-1",
)
"""Values that somebody who writes a parser does not think of."""

SCRAPS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 2000,
    b"{",
    b'"',
    b"\n",
    b"1e999",
    b"9" * 5000,
    b"\\ud800",
    b",",
)


def mutate(path: Path, draw: random.Random) -> str:
    """Mutate a file in place; return what was done to it, in a few words."""
    data = _data_of(path)
    chance = draw.random()
    if chance < 0.06:
        return _another_kind_of_file(path, draw)
    if data is not None and chance < 0.7:
        return _mutate_data(path, data, draw)
    return _mutate_bytes(path, draw)


def _data_of(path: Path) -> Any:
    """Return the data of a JSON file, or the lines of a file of them; None for others."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text) if path.suffix == ".json" else None
    except ValueError:
        return None


def _mutate_data(path: Path, data: Any, draw: random.Random) -> str:
    data, said = copy.deepcopy(data), []
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        said.append(_mutate_place(data, draw))
    if path.suffix == ".jsonl" and isinstance(data, list):
        text = "".join(json.dumps(line) + "\n" for line in data)
    else:
        text = json.dumps(data)
    path.write_text(text, encoding="utf-8")
    return "; ".join(said)


def _mutate_place(data: Any, draw: random.Random) -> str:
    """Change one place, drawn by going down from the top and stopping now and then."""
    holder, key, path = None, None, ""
    inside = data
    while isinstance(inside, dict | list) and inside and (holder is None or draw.random() < 0.75):
        holder = inside
        key = draw.choice(list(inside)) if isinstance(inside, dict) else draw.randrange(len(inside))
        path += f"/{key}"
        inside = inside[key]
    if holder is None:
        return "nothing to change"
    value = draw.choice(NASTY)
    what = draw.randrange(6)
    if what == 0:
        del holder[key]
        return f"{path} deleted"
    if what == 1 and isinstance(inside, int | float) and not isinstance(inside, bool):
        holder[key] = draw.choice((inside + 1, inside - 1, -inside, inside * 1000, inside + 0.5, str(inside)))
        return f"{path} = {holder[key]!r}"[:200]
    if what == 2 and isinstance(inside, list) and inside:
        holder[key] = draw.choice((inside[:-1], inside + inside, inside[::-1], [inside], [*inside, value]))
        return f"{path} of another length or order"
    if what == 3 and isinstance(holder, dict):
        holder[draw.choice(("", "extra", "__class__", f"{key} "))] = value
        return f"{path} beside a new key"
    holder[key] = value
    return f"{path} = {value!r}"[:200]


def _mutate_bytes(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    size = len(content)
    # most bytes of weights are numbers, of which none is invalid: look at the beginning, where headers are, more often
    place = draw.randrange(min(size, 400) if draw.random() < 0.5 else size) if size else 0
    what = draw.randrange(7)
    if what == 0:
        content = content[:place]
    elif what == 1 and size:
        for _ in range(draw.choice((1, 8, 64))):
            content[draw.randrange(min(size, 2 * place + 1))] = draw.randrange(256)
    elif what == 2:
        content[place:place] = draw.choice(SCRAPS)
    elif what == 3:
        end = draw.randrange(place, size + 1)
        content[place:place] = content[place:end]
    elif what == 4:
        del content[place : place + draw.choice((1, 8, 200))]
    elif what == 5:
        content[place : place + 64] = bytes(64)
    else:
        content = bytearray(draw.choice((b"", draw.randbytes(300), b"null", b"[]", b"{}", b"[" * 100_000)))
    path.write_bytes(content)
    return f"bytes {what} at {place}"


def _another_kind_of_file(path: Path, draw: random.Random) -> str:
    kinds: dict[str, Callable[[], object]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a device without end": lambda: path.symlink_to("/dev/zero"),
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to(path.with_name("nowhere")),
        "a link to itself": lambda: path.symlink_to(path),
        "a terabyte of zeros": lambda: _sparse(path, 1 << 40),
        "gone": lambda: None,
    }
    name = draw.choice(list(kinds))
    path.unlink()
    kinds[name]()
    return name


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def remove(path: Path) -> None:
    """Remove whatever is there now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
