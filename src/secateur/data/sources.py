"""Sources of texts by name or place: with the interpreter, on the hub, in local files. They yield documents.

Documents are read lazily. Nothing here knows about tokens; `cutting.py` turns documents into windows.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data.documents import Documents, Split, shuffled
from secateur.data.hub import HUB, HubText, hub_documents, hub_rows
from secateur.data.interpreter import DOCS, STDLIB, manual_documents, stdlib_documents
from secateur.data.local_files import local_documents, local_rows
from secateur.errors import InputError, unknown

OWN = "self"
"""Text that the model writes itself: `own_text.py` makes it, since it has no documents."""
DIVERSE = "diverse"
"""Code, prose and the model's own text: `diverse.py` says which are available here and now."""


@dataclass(frozen=True)
class NamedText:
    """A named source: its origin, its part for calibration and its held-out part."""

    name: str
    origin: str
    calibration: str
    held_out: str


def text_names() -> list[NamedText]:
    """Return every named source, the ones that need no download first."""
    return [
        NamedText(STDLIB, "the standard library of the running Python: code", "7 of 10 modules", "3 of 10 modules"),
        NamedText(DOCS, "the language reference of the running Python: prose", "7 of 10 topics", "3 of 10 topics"),
        NamedText(OWN, "the model itself: sampled, kept in the cache", "windows of the seed", "others"),
        NamedText(DIVERSE, f"{STDLIB}, {DOCS}, {OWN}; alpaca with a network", "equal parts", f"{STDLIB}, {DOCS}"),
        *(_named(name, row) for name, row in HUB.items()),
    ]


def _named(name: str, row: HubText) -> NamedText:
    origin = f"{row.path} ({row.config})" if row.config else row.path
    if row.held_out is None:
        return NamedText(name, origin, f"7 of 10 documents of {row.calibration}", "the other 3 of 10")
    return NamedText(name, origin, row.calibration, row.held_out)


def is_source(source: str) -> bool:
    """Return whether `source` is a named source or a path that exists."""
    return source in (STDLIB, DOCS, OWN) or source in HUB or os.path.exists(os.path.expanduser(source))


def open_documents(source: str, split: Split, seed: int, *, whole: bool) -> Documents:
    """Open one named source or local path; a name takes precedence over a folder of the same name.

    Args:
        source: a name from `text_names()`, or a file or folder.
        split: "calibration" shuffles the documents, "held-out" keeps their order. A local path is not split: all of it
            is used for both.
        seed: seed of the shuffling.
        whole: the caller reads to the end, which is refused for data sets of many gigabytes.

    Raises:
        InputError: the source is unknown, or cannot be read; also later, while documents are read.
    """
    if source == STDLIB:
        return stdlib_documents(split, seed)
    if source == DOCS:
        return manual_documents(split, seed)
    if source in HUB:
        return hub_documents(source, split, seed, whole)
    if source == DIVERSE:
        raise InputError(f"{DIVERSE} is a mixture itself and no part of one; name its parts: {STDLIB},{DOCS},{OWN}")
    if not is_source(source) or source == OWN:
        names = [named.name for named in text_names()]
        raise InputError(f"{unknown('text', source, names)} A file or folder of your own may be given too.")
    path = Path(source).expanduser()
    texts = local_documents(path)
    return Documents(shuffled(texts, seed) if split == "calibration" else texts, path.resolve().name)


def open_rows(source: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return the rows of a data set on the hub or of a local file, with all fields; those on the hub are shuffled.

    Raises:
        InputError: the source is not known, holds no rows, or cannot be read.
    """
    if source in HUB:
        yield from hub_rows(source, seed)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{source}: no rows to read there; give a jsonl or parquet file, or a data set by name.")
    yield from local_rows(path)
