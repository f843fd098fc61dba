"""Texts that come with the running interpreter: its standard library as code, its language reference as prose."""

import hashlib
import os
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from secateur.data.documents import Documents, Split, held_out
from secateur.errors import InputError

STDLIB = "python-stdlib"
DOCS = "python-docs"


def stdlib_modules() -> dict[str, Path]:
    """Return the files of the standard library by dotted module name, packages without `.__init__`.

    Left out: tests, IDLE, installed packages, bundled wheels and topics, and the generated build settings.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules: dict[str, Path] = {}
    for folder, inner, files in os.walk(root):
        here = Path(folder).relative_to(root)
        inner[:] = [name for name in inner if not _left_out(name, top=here == Path())]
        for file in files:
            name = ".".join((*here.parts, file.removesuffix(".py"))).removesuffix(".__init__")
            # _sysconfigdata_* is written when Python is compiled, so it differs from machine to machine
            if file.endswith(".py") and not file.startswith(("__phello__", "_sysconfigdata")):
                modules[name] = Path(folder, file)
    return modules


def _left_out(folder: str, *, top: bool) -> bool:
    anywhere = ("test", "tests", "__pycache__", "__phello__", "site-packages", "dist-packages")
    at_the_top = ("idlelib", "ensurepip", "pydoc_data")
    return folder in anywhere or folder.startswith("config-") or (top and folder in at_the_top)


def stdlib_documents(split: Split, seed: int) -> Documents:
    """Open the modules of one part of the standard library.

    Raises:
        InputError: its source is not installed.
    """
    modules = stdlib_modules()
    if not modules:
        raise InputError(
            f"the source of the standard library is not at {sysconfig.get_paths()['stdlib']}; "
            "give a local file or folder instead"
        )
    wanted = _names_of(modules, split, seed)
    label = f"{STDLIB}(python {platform.python_version()}, {split})"
    return Documents(_valid_utf8(modules[name] for name in wanted), label)


def _names_of(names: Iterable[str], split: Split, seed: int) -> list[str]:
    """Return the names in one part: held-out ones in the order of their hashes, those for calibration shuffled."""
    wanted = [name for name in names if held_out(name) == (split == "held-out")]
    wanted.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if split == "calibration":
        random.Random(seed).shuffle(wanted)
    return wanted


def _valid_utf8(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def manual_topics() -> dict[str, str]:
    """Return the topics of Python's language reference by name, as `help("assert")` shows them: reStructuredText.

    Raises:
        InputError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            f"{DOCS}: this Python comes without its manual (pydoc_data); give {STDLIB} or a file of your own"
        ) from error
    found: dict[str, str] = topics
    return found


def manual_documents(split: Split, seed: int) -> Documents:
    """Open the topics of one part. Some quote others: held-out text is removed from those for calibration.

    Raises:
        InputError: this Python comes without them.
    """
    topics = manual_topics()
    kept_back = {piece for name in topics if held_out(name) for piece in _paragraphs(topics[name])}
    texts = (topics[name] for name in _names_of(topics, split, seed))
    if split == "calibration":
        texts = ("\n\n".join(piece for piece in _paragraphs(text) if piece not in kept_back) for text in texts)
    return Documents(texts, f"{DOCS}(python {platform.python_version()}, {split})")


def _paragraphs(text: str) -> list[str]:
    return text.strip().split("\n\n")
