"""Text sources: the interpreter's library and manual, data sets on the hub, local files. They yield documents.

Documents are read lazily: 32 windows of a 600 GB data set take a few megabytes of it.
Nothing here knows about tokens; `texts.py` turns documents into windows.
"""

import hashlib
import os
import platform
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from secateur.data.local_files import joined, local_documents, local_rows
from secateur.errors import InputError, unknown

Split = Literal["calibration", "held-out"]

STDLIB = "python-stdlib"
DOCS = "python-docs"
OWN = "self"
"""Text that the model writes itself: `own_text.py` makes it, since it has no documents."""
DIVERSE = "diverse"
"""Code, prose and the model's own text: `diverse.py` says which are available here and now."""

# A local file is shuffled through a pool of this size, so small files are shuffled completely.
POOL_DOCUMENTS = 100_000
POOL_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class Documents:
    """Documents in the order of use, and notes about them.

    `label` names them in a fingerprint: the same label and the same settings mean the same text.
    """

    texts: Iterator[str]
    label: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedText:
    """A named source: its origin, its part for calibration and its held-out part."""

    name: str
    origin: str
    calibration: str
    held_out: str


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A data set on the hub, in parquet or JSON lines: `datasets` no longer runs loading scripts."""

    path: str
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    calibration: str = "train"
    held_out: str | None = None  # None: the data set has no such split, and documents are held out by hash
    streaming: bool = True  # False for those small enough to download and cache completely
    pool: int = POOL_DOCUMENTS  # documents held while shuffling
    rows: Literal["documents", "articles", "sentences"] = "documents"  # what one row of the data set is
    excerpt: int | None = None  # characters: calibration takes one excerpt of each document
    fields: tuple[str, ...] = ("text",)  # what the text of a row is in, joined with newlines
    revision: str | None = None


# Checked in stored copies of the hub's pages and in public code, not by downloading:
#   Salesforce/wikitext   file lists of both -raw-v1 configurations: parquet; train, validation, test;
#                         36,718 / 3,760 / 4,358 rows (wikitext-2); one row is one line of an article
#   allenai/c4            both file names below as loaded by MaskLLM, GPTQ and many others; JSON lines, gzip
#   tatsu-lab/alpaca      data/train-00000-of-00001-*.parquet (24 MB), viewer: train only, 52k rows; text
#   DKYoon/SlimPajama-6B  48 train parquet files, viewer: train 5.49M, validation 9.35k, test 9.35k rows; text
#   emozilla/pg19         23 train parquet files (of 0.3 GB), validation, test (100 books); text;
#                         deepmind/pg19 itself still needs a script
#   yahma/alpaca-cleaned  used as loaded here by many; JSON, train only; instruction, input, output
#   ptb-text-only         needs a script itself; the hub's own conversion to parquet, not looked at; sentence
#   rojagtap/bookcorpus   viewer: one configuration, train only, 74M rows; one row is one sentence; text
HUB: dict[str, HubText] = {
    "wikitext2": HubText(
        path="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        held_out="test",
        streaming=False,
        rows="articles",
    ),
    "wikitext103": HubText(
        path="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        held_out="test",
        rows="articles",
        pool=1_000,
    ),
    "c4": HubText(
        path="allenai/c4",
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        held_out="validation",
        pool=10_000,
    ),
    "alpaca": HubText(path="tatsu-lab/alpaca", streaming=False),
    "alpaca-cleaned": HubText(path="yahma/alpaca-cleaned", streaming=False, fields=("instruction", "input", "output")),
    "slimpajama": HubText(path="DKYoon/SlimPajama-6B", held_out="test", pool=5_000),
    "pg19": HubText(path="emozilla/pg19", held_out="test", pool=16, excerpt=20_000),
    "pg19-validation": HubText(
        path="emozilla/pg19", calibration="validation", held_out="test", pool=16, excerpt=20_000
    ),
    "bookcorpus": HubText(path="rojagtap/bookcorpus", rows="sentences", pool=4_000),
    "ptb": HubText(
        path="ptb-text-only/ptb_text_only",
        data_files={split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation")},
        revision="refs/convert/parquet",
        held_out="validation",
        streaming=False,
        fields=("sentence",),
    ),
}


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
        return _stdlib_documents(split, seed)
    if source == DOCS:
        return _manual_documents(split, seed)
    if source in HUB:
        return _hub_documents(source, split, seed, whole)
    if source == DIVERSE:
        raise InputError(f"{DIVERSE} is a mixture itself and no part of one; name its parts: {STDLIB},{DOCS},{OWN}")
    if not is_source(source) or source == OWN:
        names = [named.name for named in text_names()]
        raise InputError(f"{unknown('text', source, names)} A file or folder of your own may be given too.")
    path = Path(source).expanduser()
    texts = local_documents(path)
    return Documents(_shuffled(texts, seed) if split == "calibration" else texts, path.resolve().name)


def open_rows(source: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return the rows of a data set on the hub or of a local file, with all fields; those on the hub are shuffled.

    Raises:
        InputError: the source is not known, holds no rows, or cannot be read.
    """
    if source in HUB:
        row = HUB[source]
        with _hub_errors(source, row):
            data = _load(row, row.calibration)
            yield from data.shuffle(seed=seed, buffer_size=row.pool) if row.streaming else data.shuffle(seed=seed)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{source}: no rows to read there; give a jsonl or parquet file, or a data set by name.")
    yield from local_rows(path)


def held_out(name: str) -> bool:
    """Return whether the document of this name is held out: three of ten are, by the sha256 of the name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 < 3


def _shuffled(
    texts: Iterable[str], seed: int, documents: int = POOL_DOCUMENTS, characters: int = POOL_CHARACTERS
) -> Iterator[str]:
    """Shuffle through a pool of limited size; what fits into the pool is shuffled perfectly."""
    rng, pool, size = random.Random(seed), list[str](), 0
    for text in texts:
        pool.append(text)
        size += len(text)
        while len(pool) > documents or size > characters:
            chosen = rng.randrange(len(pool))
            pool[chosen], pool[-1] = pool[-1], pool[chosen]
            size -= len(pool[-1])
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool


# The standard library of the running interpreter


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


def _stdlib_documents(split: Split, seed: int) -> Documents:
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


# The manual of the running interpreter


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


def _manual_documents(split: Split, seed: int) -> Documents:
    """Open the topics of one part. Some quote others: held-out text is removed from those for calibration."""
    topics = manual_topics()
    kept_back = {piece for name in topics if held_out(name) for piece in _paragraphs(topics[name])}
    texts = (topics[name] for name in _names_of(topics, split, seed))
    if split == "calibration":
        texts = ("\n\n".join(piece for piece in _paragraphs(text) if piece not in kept_back) for text in texts)
    return Documents(texts, f"{DOCS}(python {platform.python_version()}, {split})")


def _paragraphs(text: str) -> list[str]:
    return text.strip().split("\n\n")


# Data sets on the hub


def _hub_documents(name: str, split: Split, seed: int, whole: bool) -> Documents:
    row = HUB[name]
    if whole and row.streaming and (split == "calibration" or row.held_out is None):
        raise InputError(f"{name} is too large to be taken whole; say how many windows")
    texts = _hub_texts(row, split, seed)
    notes = []
    if row.held_out is None:
        notes.append(f"{name} has no held-out split: 3 of 10 documents, chosen by hash, serve as one")
    if row.excerpt is not None and split == "calibration":
        notes.append(f"one excerpt of {row.excerpt} characters of each document of {name}")
    return Documents(_with_hub_errors(texts, name, row), f"{name}({split})", tuple(notes))


def _hub_texts(row: HubText, split: Split, seed: int) -> Iterator[str]:
    """Open the data set and return its documents, in order or shuffled."""
    calibration = split == "calibration"
    data = _load(row, row.calibration if calibration or row.held_out is None else row.held_out)
    # A stream also shuffles its files, which would move lines of an article apart and renumber the
    # documents of a split by hash; those are shuffled here, after grouping and numbering.
    by_itself = calibration and row.streaming and row.rows == "documents" and row.held_out is not None
    if by_itself:
        data = data.shuffle(seed=seed, buffer_size=row.pool)
    texts = _grouped((joined(item, row.fields, row.path) for item in data), row.rows)
    if row.held_out is None:
        texts = (text for number, text in enumerate(texts) if held_out(str(number)) != calibration)
    if calibration and not by_itself:
        texts = _shuffled(texts, seed, row.pool)
    if calibration and row.excerpt is not None:
        texts = _excerpts(texts, row.excerpt, seed)
    yield from texts


def _load(row: HubText, split: str) -> Any:
    import datasets

    return datasets.load_dataset(
        row.path,
        name=row.config,
        data_files=dict(row.data_files) if row.data_files else None,
        split=split,
        streaming=row.streaming,
        revision=row.revision,
    )


@contextmanager
def _hub_errors(name: str, row: HubText) -> Iterator[None]:
    """Convert what the hub may raise into one message that names an alternative."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    advice = f"use a local file or {STDLIB}, which need no network"
    try:
        yield
    except (ConnectionError, TimeoutError, HTTPError) as error:
        raise InputError(f"cannot reach the hub for {name} ({row.path}): {error}; {advice}") from error
    except (OSError, DatasetsError) as error:
        raise InputError(f"cannot load {name} ({row.path}) from the hub: {error}; {advice}") from error


def _with_hub_errors(texts: Iterator[str], name: str, row: HubText) -> Iterator[str]:
    with _hub_errors(name, row):
        yield from texts


def _grouped(rows: Iterator[str], kind: str) -> Iterator[str]:
    """Make documents of rows: rows as they are, lines into articles, or 64 sentences into one text."""
    if kind == "articles":
        return _articles(rows)
    if kind == "sentences":
        return (" ".join(group) for group in iter(lambda: list(islice(rows, 64)), []))
    return rows


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's lines into articles; a heading of the first level (` = Title = `) begins one.

    Empty lines are kept, so that the articles joined with blank lines are all lines joined with blank lines:
    the text on which the published WikiText perplexities are measured.
    """
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = (?!= ).+ = \n?", line) and any(text.strip() for text in article):
            yield "\n\n".join(article)
            article = []
        article.append(line)
    yield "\n\n".join(article)


def _excerpts(texts: Iterable[str], characters: int, seed: int) -> Iterator[str]:
    """Take one excerpt of each document, at a random place: otherwise 32 windows could all come from one book."""
    rng = random.Random(seed)
    for text in texts:
        start = rng.randrange(max(1, len(text) - characters + 1))
        yield text[start : start + characters]
