"""Read files that somebody else may have written: a limit before anything is parsed, and one message for every failure.

Each kind of file is one `FileKind`, and everything that reads such a file goes through it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import InputError, SecateurError, first_line

Read = TypeVar("Read")

MIB = 1 << 20
LARGEST_INTEGER = 1 << 63
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_SHOWN = 300


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Attributes:
        name: as messages call it, such as "plan".
        most: the largest size in bytes that is read.
        error: what is raised if it cannot be read.
        advice: what to do about a file that is not valid, as the end of the message.
    """

    name: str
    most: int
    error: type[SecateurError] = InputError
    advice: str = ""

    def text(self, path: Path) -> str:
        """Return the text of a file, in UTF-8.

        Raises:
            SecateurError: of the kind `error`: it cannot be read, is no ordinary file, too large, or not text.
        """
        return self._text(path, self.content(path))

    def content(self, path: Path) -> bytes:
        """Return the bytes of a file.

        Raises:
            SecateurError: of the kind `error`: it cannot be read, is no ordinary file, or too large.
        """
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would be waited for
            with os.fdopen(handle, "rb") as stream:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    raise self.error(f"{path}: the {self.name} cannot be read (not an ordinary file).")
                if found.st_size > self.most:
                    raise self.error(
                        f"{path}: not a valid {self.name}: {found.st_size / MIB:,.1f} MiB, and at most "
                        f"{self.most / MIB:,g} MiB are read."
                    )
                return stream.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise self.error(f"{path}: the {self.name} cannot be read ({reason}).") from error

    def json(self, path: Path) -> Any:
        """Return the data of a JSON file.

        Raises:
            SecateurError: as `text`, or not JSON, or nested too deeply, or with numbers that no computer counts in.
        """
        return self.parsed(path, from_json)

    def parsed(self, path: Path, parse: Callable[[str], Read]) -> Read:
        """Return what `parse` makes of a file's text; whatever it raises becomes one message.

        Raises:
            SecateurError: as `text`, or of the kind `error` for everything that `parse` raises.
        """
        return self.parsed_text(path, self.text(path), parse)

    def parsed_text(self, path: Path, text: str, parse: Callable[[str], Read]) -> Read:
        """Return what `parse` makes of (a part of) the text of a file; errors as `parsed`."""
        with_path = f"{path}: not a valid {self.name}: "
        try:
            return parse(text)
        except SecateurError as error:
            raise type(error)(f"{with_path}{_ended(str(error))}{self._hint}") from error
        except Exception as error:  # what a parser raises at a damaged file is not known beforehand
            raise self.error(f"{with_path}{_ended(_reason(error))}{self._hint}") from error

    @property
    def _hint(self) -> str:
        return f" {self.advice}" if self.advice else ""

    def _text(self, path: Path, content: bytes) -> str:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error(f"{path}: not a valid {self.name}: not text.{self._hint}") from error


def from_json(text: str, *, any_integer: bool = False) -> Any:
    """Return the data of a JSON text.

    Args:
        text: the text.
        any_integer: whether integers may be of any size, because the caller compares each with limits of its own.

    Raises:
        ValueError: not JSON; an integer beyond 64 bits; half a character (a lone surrogate), which nothing can print.
        RecursionError: nested too deeply.
    """
    found = json.loads(text, parse_int=None if any_integer else _integer)
    if _SURROGATE.search(text):
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST_INTEGER <= int(digits) < LARGEST_INTEGER:
        raise ValueError(f"{digits[:20]}… is too large a number")
    return int(digits)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return "half a character (a lone surrogate)"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return first_line(error)[:_MOST_SHOWN]


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
