"""Data sets on the hub by name, streamed or cached: 32 windows of a 600 GB data set take a few megabytes of it."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from secateur.data.documents import POOL_DOCUMENTS, Documents, Split, held_out, shuffled
from secateur.data.interpreter import STDLIB
from secateur.data.local_files import joined
from secateur.errors import InputError


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


def hub_documents(name: str, split: Split, seed: int, whole: bool) -> Documents:
    """Open one part of a data set.

    Raises:
        InputError: all of a data set of many gigabytes is asked for; also later, if it cannot be read.
    """
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
        texts = shuffled(texts, seed, row.pool)
    if calibration and row.excerpt is not None:
        texts = _excerpts(texts, row.excerpt, seed)
    yield from texts


def hub_rows(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return the rows of a data set with all fields, shuffled.

    Raises:
        InputError: it cannot be read.
    """
    row = HUB[name]
    with _hub_errors(name, row):
        data = _load(row, row.calibration)
        yield from data.shuffle(seed=seed, buffer_size=row.pool) if row.streaming else data.shuffle(seed=seed)


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
