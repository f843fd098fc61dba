"""Read the header of a GGUF file: its entries, and where its tensors are.

The reader of the package `gguf` makes an array of every string, which takes seconds for a vocabulary of 50,000 tokens.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import ModelError

_STRING, _ARRAY = 8, 9
_NUMBERS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
"""Types of entries by number, as numpy names them."""
_ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """One entry of a GGUF header.

    Attributes:
        value: a number, string, or list.
        kind: its type in the file, as a number; None for what is written with the type it has.
        of: the type of a list's items.
    """

    value: Any
    kind: int | None = None
    of: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its shape as in PyTorch, its type as a number, and its bytes in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file."""

    entries: dict[str, Entry]
    tensors: dict[str, Place]


def read_header(file: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        ModelError: not a GGUF file of version 2 or 3 in this byte order, or damaged.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data).header()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); name another file.") from error
    except (ValueError, KeyError, struct.error, MemoryError) as error:
        raise ModelError(f"{file}: not a GGUF file, truncated or damaged ({error}); name another file.") from error


class _Parser:
    """A position in the bytes of a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> Header:
        """Parse everything before the tensors' data."""
        magic, version = self._take(4), self._number(4)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"begins with {magic!r}, version {version}")
        tensors, entries = self._number(8), self._number(8)
        found = dict(self._entry() for _ in range(entries))
        listed = [self._tensor() for _ in range(tensors)]
        alignment = int(found["general.alignment"].value) if "general.alignment" in found else _ALIGNMENT
        start = -(-self._at // alignment) * alignment
        places = {name: Place(shape, kind, start + offset, size) for name, shape, kind, offset, size in listed}
        end = max((one.begin + one.bytes for one in places.values()), default=0)
        if end > len(self._data):
            raise ValueError(f"{len(self._data):,} bytes, and its header speaks of {end:,}")
        return Header(found, places)

    def _take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) < count:
            raise ValueError("it ends within the header")
        self._at += count
        return found

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _text(self) -> str:
        return self._take(self._number(8)).decode("utf-8")

    def _entry(self) -> tuple[str, Entry]:
        name, kind = self._text(), self._number(4)
        if kind != _ARRAY:
            return name, Entry(self._value(kind), kind)
        of, count = self._number(4), self._number(8)
        if of == _STRING:
            return name, Entry([self._text() for _ in range(count)], kind, of)
        numbers = np.dtype(_NUMBERS[of])
        return name, Entry(np.frombuffer(self._take(count * numbers.itemsize), numbers).tolist(), kind, of)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        numbers = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(numbers.itemsize), numbers)[0].item()

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self._text(), self._number(4)
        shape = tuple(self._number(8) for _ in range(dimensions))[::-1]
        kind, offset = self._number(4), self._number(8)
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return name, shape, kind, offset, prod(shape) // block * width
