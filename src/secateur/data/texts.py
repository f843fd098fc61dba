"""Named or local texts → windows of tokens, seeded and fingerprinted.

Shapes: W windows of T tokens (`seq_len`, the beginning-of-sequence token included).
"""

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from secateur.data.diverse import parts_of_diverse
from secateur.data.own_text import OwnText
from secateur.data.sources import DIVERSE, OWN, Documents, Split, is_source, open_documents
from secateur.data.windows import Windows, check_vocabulary, counted, digest, load_windows
from secateur.errors import InputError, first_line, unknown
from secateur.models.decoder import Decoder
from secateur.models.widths import rows_per_token
from secateur.run_options import DEFAULTS, RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]

BETWEEN_DOCUMENTS = "\n\n"
SHORTEST = 8  # tokens: a shorter window, or a shorter document of its own, says nothing about a model
MARGIN = 64  # tokens at the end of a truncated text that are not used: the cut may have split a word


@dataclass(frozen=True)
class _Cutting:
    """How documents become windows: the settings of `open_texts`, checked."""

    tokenizer: "PreTrainedTokenizerBase"
    seq_len: int
    seed: int
    split: Split
    pack: bool
    bos: bool
    vocab_size: int | None
    own: OwnText | None

    @property
    def text_tokens(self) -> int:
        return self.seq_len - self.bos


@dataclass(frozen=True)
class Reader:
    """What reads the windows.

    Attributes:
        tokenizer: of the model; None if it has none.
        vocab_size: of the model; larger token ids are refused.
        max_positions: of the model; longer windows are refused.
        own: the model, if the source is or contains "self": text that it writes.
    """

    tokenizer: "PreTrainedTokenizerBase | None"
    vocab_size: int | None = None
    max_positions: int | None = None
    own: OwnText | None = None


def open_texts(
    source: str,
    reader: "Reader | PreTrainedTokenizerBase | None",
    *,
    windows: int | None = 32,
    seq_len: int = 512,
    seed: int = 0,
    split: Split = "calibration",
    pack: bool = True,
    bos: Bos = "auto",
) -> Windows:
    """Convert a text source into windows of tokens. The same arguments always give the same windows.

    Args:
        source: a name (see `text_names`), a local file or folder (.txt, .md, .json, .jsonl, .csv, .parquet), a
            mixture of these ("wikitext2:0.7,alpaca:0.3", or "a,b" for equal shares; shares are of the windows), or
            a .npy file of token ids (W, T), which is used exactly as given: no tokenizer, no shuffling, and
            `windows`, `seq_len`, `pack` and `bos` do not apply.
        reader: the model that will read the windows, or its tokenizer alone.
        windows: number of windows; None for all the text there is.
        seq_len: tokens in a window, the beginning-of-sequence token included.
        seed: seed of the shuffling.
        split: "calibration" shuffles the documents; "held-out" takes, in order, the part that calibration
            never sees. A local path is not split: all of it is used for both.
        pack: True joins the documents with blank lines, tokenises the whole once and cuts it into adjoining
            windows, the last partial one dropped. False puts one document in each window, cut or padded
            on the right; documents shorter than 8 tokens are skipped.
        bos: whether each window begins with the beginning-of-sequence token: "auto" does what the tokenizer
            does by default.

    Raises:
        InputError: an unknown source, one that cannot be read or holds too little text, or a setting that
            cannot be met.
    """
    reader = reader if isinstance(reader, Reader) else Reader(reader)
    tokenizer = reader.tokenizer
    if source == DIVERSE:
        source, said = parts_of_diverse(windows, split, reader.own)
        found = open_texts(source, reader, windows=windows, seq_len=seq_len, seed=seed, split=split, pack=pack, bos=bos)
        return replace(found, notes=(*said, *found.notes))
    shares = _parse(source)
    first = next(iter(shares))
    if len(shares) == 1 and first.lower().endswith(".npy"):
        return load_windows(source, first, tokenizer, windows, seq_len, reader.vocab_size, reader.max_positions)
    _check_sizes(windows, seq_len, reader.max_positions)
    if split not in ("calibration", "held-out"):
        raise unknown("split", split, ["calibration", "held-out"])
    if tokenizer is None:
        raise InputError(f"no tokenizer to read '{source}' with; give one, or a .npy file of token ids")
    cutting = _Cutting(tokenizer, seq_len, seed, split, pack, wants_bos(tokenizer, bos), reader.vocab_size, reader.own)
    if len(shares) == 1:
        return _cut(source, first, windows, cutting)
    return _mixed(source, shares, windows, cutting)


def _check_sizes(windows: int | None, seq_len: int, max_positions: int | None) -> None:
    if windows is not None and windows < 1:
        raise InputError(f"at least one window is needed, not {windows}")
    if seq_len < SHORTEST:
        raise InputError(f"windows of {seq_len} tokens are too short; take at least {SHORTEST}")
    if max_positions is not None and seq_len > max_positions:
        raise InputError(
            f"windows of {seq_len} tokens are longer than the {max_positions} positions of the model; "
            f"take --seq-len {max_positions} or less"
        )


def wants_bos(tokenizer: "PreTrainedTokenizerBase", bos: Bos) -> bool:
    """Return whether windows begin with the beginning-of-sequence token.

    Raises:
        InputError: an unknown word, or a tokenizer without that token.
    """
    if bos not in ("auto", "always", "never"):
        raise unknown("setting for bos", bos, ["auto", "always", "never"])
    if bos == "always" and tokenizer.bos_token_id is None:
        raise InputError("bos is 'always', but the tokenizer has no beginning-of-sequence token; use 'auto'")
    if bos == "auto" and tokenizer.bos_token_id is not None:
        return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return bos == "always"


# One source → windows


def _cut(source: str, part: str, count: int | None, cutting: _Cutting) -> Windows:
    """Open one part of `source` and cut it into at most `count` windows."""
    if part == OWN:
        return _own(source, count, cutting)
    documents = open_documents(part, cutting.split, cutting.seed, whole=count is None)
    rows, mask_WT, notes = (_packed if cutting.pack else _one_each)(documents, count, cutting)
    tokens_WT = torch.tensor(rows, dtype=torch.int64)
    if cutting.bos:
        tokens_WT = torch.nn.functional.pad(tokens_WT, (1, 0), value=cutting.tokenizer.bos_token_id)
        mask_WT = None if mask_WT is None else torch.nn.functional.pad(mask_WT, (1, 0), value=True)
    check_vocabulary(tokens_WT, cutting.vocab_size, f"the tokenizer (reading {part})")
    if count is not None and len(rows) < count:
        notes = [f"{counted(len(rows), 'window')} instead of the {count} asked for", *notes]
    return Windows(
        tokens_WT,
        mask_WT,
        source,
        f"{documents.label}:{digest(tokens_WT, mask_WT)}",
        cutting.seed if cutting.split == "calibration" else None,
        cutting.bos,
        (*documents.notes, *notes),
    )


def _own(source: str, count: int | None, cutting: _Cutting) -> Windows:
    """Let the model write this many windows."""
    if cutting.own is None:
        raise InputError(f"{OWN} is text that the model writes: open it for a model (windows_for), not for a tokenizer")
    if count is None:
        raise InputError(f"{OWN} has no end; say how many windows")
    tokens_WT = cutting.own.windows(
        count, cutting.seq_len, seed=cutting.seed, held_out=cutting.split == "held-out", bos=cutting.bos
    )
    label = f"{OWN}({cutting.own.label}, {cutting.split})"
    mask_WT = None if cutting.pack else torch.ones_like(tokens_WT, dtype=torch.bool)
    fingerprint = f"{label}:{digest(tokens_WT, mask_WT)}"
    seed = cutting.seed if cutting.split == "calibration" else None
    return Windows(tokens_WT, mask_WT, source, fingerprint, seed, cutting.bos, cutting.own.notes)


Cut = tuple[list[list[int]], torch.Tensor | None, list[str]]


def _packed(documents: Documents, count: int | None, cutting: _Cutting) -> Cut:
    """Join the documents, tokenise once, cut into adjoining windows."""
    length = cutting.text_tokens
    filled = (text for text in documents.texts if text.strip())
    ids = _first_tokens(filled, None if count is None else count * length, cutting.tokenizer)
    full = len(ids) // length
    if not full:
        raise _too_little(documents, f"{len(ids)} tokens of text, one window needs {length}")
    rows = [ids[start : start + length] for start in range(0, full * length, length)][:count]
    dropped = len(ids) - full * length
    last_is_partial = dropped and (count is None or full < count)
    return rows, None, [f"last {counted(dropped, 'token')} dropped"] if last_is_partial else []


def _one_each(documents: Documents, count: int | None, cutting: _Cutting) -> Cut:
    """Put each document into a window of its own, cut or padded on the right."""
    length, short, rows = cutting.text_tokens, 0, list[list[int]]()
    for text in documents.texts:
        ids = _first_tokens(iter([text]), max(length, SHORTEST), cutting.tokenizer)
        if len(ids) < SHORTEST:
            short += 1
            continue
        rows.append(ids[:length])
        if len(rows) == count:
            break
    if not rows:
        raise _too_little(documents, f"{counted(short, 'document')}, all shorter than {SHORTEST} tokens")
    mask_WT = torch.arange(length) < torch.tensor([[len(ids)] for ids in rows])
    padding = _padding_id(cutting.tokenizer)
    notes = [f"{counted(short, 'document')} shorter than {SHORTEST} tokens skipped"] if short else []
    return [ids + [padding] * (length - len(ids)) for ids in rows], mask_WT, notes


def _padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _too_little(documents: Documents, found: str) -> InputError:
    return InputError(f"too little text in {documents.label}: {found}; take a smaller --seq-len or more text")


def _first_tokens(texts: Iterator[str], needed: int | None, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenise the joined texts as one, reading no further than it takes to find `needed` tokens.

    Returns:
        All tokens when the texts end here (perhaps more than needed), else exactly `needed`. These are the
        first tokens of the whole, since the last tokens of a text that was cut short are not used.
    """
    parts, size, ended = list[str](), 0, False
    wanted = sys.maxsize if needed is None else 4 * (needed + MARGIN)  # characters, a first guess
    while True:
        while not ended and size <= wanted:
            more = list(islice(texts, 1))
            parts += more
            size += sum(map(len, more)) + len(BETWEEN_DOCUMENTS)
            ended = not more
        text = BETWEEN_DOCUMENTS.join(parts)
        ids = _encode(text[:wanted], tokenizer)
        if needed is None or (ended and len(text) <= wanted):
            return ids
        if len(ids) >= needed + MARGIN:
            return ids[:needed]
        characters_per_token = wanted / max(1, len(ids))
        wanted = math.ceil(max(1.25 * wanted, 1.1 * characters_per_token * (needed + MARGIN)))


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    # verbose=False: the text is longer than the model's context on purpose, no warning is due
    try:
        return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise InputError(f"the tokenizer cannot read the text: {first_line(error)}; give another one") from error


# Mixtures


def _parse(source: str) -> dict[str, float]:
    """Split "a:0.7,b:0.3" into shares that sum to one; what exists under its whole name is one source."""
    if is_source(source):
        return {source: 1.0}
    weighed = _listed(source)
    names, weights = [name for name, _ in weighed], [weight for _, weight in weighed if weight is not None]
    if not weights:
        weights = [1.0] * len(names)
    if len(weights) < len(names):
        raise InputError(f"'{source}' gives weights to some texts only; give one to each, or to none")
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def _listed(source: str) -> list[tuple[str, float | None]]:
    """Split "a:0.7,b" into names and weights; None if there is none."""
    found = [_name_and_weight(part.strip(), source) for part in source.split(",")]
    if len({name for name, _ in found}) < len(found):
        raise InputError(f"'{source}' names a text twice; name each once")
    return found


def _name_and_weight(part: str, source: str) -> tuple[str, float | None]:
    name, colon, typed = part.rpartition(":")
    if not (name if colon else part):
        raise InputError(f"'{source}' has an empty part; write it like wikitext2:0.7,alpaca:0.3")
    if is_source(part) or not colon:
        return part, None
    try:
        weight = float(typed)
    except ValueError:
        if not is_source(name):
            return part, None
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"the weight '{typed}' of '{name}' is not a positive number")
    return name, weight


def _mixed(source: str, shares: dict[str, float], windows: int | None, cutting: _Cutting) -> Windows:
    """Cut each part's share of the windows and combine them; calibration windows are shuffled."""
    if windows is None:
        raise InputError(f"'{source}' is a mixture: its shares are of a number of windows, so give one")
    if given := [name for name in shares if name.lower().endswith(".npy")]:
        raise InputError(f"{given[0]} holds finished windows and cannot be part of a mixture")
    counts = _apportion(list(shares.values()), windows)
    parts = [_cut(name, name, count, cutting) for name, count in zip(shares, counts, strict=True)]
    order = list(range(sum(map(len, parts))))
    if cutting.split == "calibration":
        random.Random(cutting.seed).shuffle(order)
    masks = [part.mask for part in parts if part.mask is not None]
    tokens_WT = torch.cat([part.tokens for part in parts])[order]
    mask_WT = torch.cat(masks)[order] if masks else None
    part_of = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))[order]
    labels = [part.fingerprint.rsplit(":sha256:", 1)[0] for part in parts]
    label = ",".join(f"{name}:{share:.4g}" for name, share in zip(labels, shares.values(), strict=True))
    notes = tuple(f"{part.source}: {note}" for part in parts for note in part.notes)
    fingerprint = f"{label}:{digest(tokens_WT, mask_WT)}"
    return Windows(
        tokens_WT,
        mask_WT,
        source,
        fingerprint,
        parts[0].seed,
        cutting.bos,
        notes,
        parts=tuple(shares),
        part_of=part_of,
    )


def _apportion(shares: list[float], windows: int) -> list[int]:
    """Distribute `windows` by shares that sum to one, largest remainder first, at least one to each."""
    if windows < len(shares):
        raise InputError(f"{windows} windows are too few for a mixture of {len(shares)} texts")
    counts = [math.floor(share * windows) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * windows)
    for i in by_remainder[: windows - sum(counts)]:
        counts[i] += 1
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


Texts = str | Path | Windows | None
"""A source as in `secateur texts`, windows made before, or None for `DEFAULT_TEXTS`."""

DEFAULT_TEXTS = DIVERSE
"""The default source: nobody should repair a model on a single kind of text without having asked for it."""

Count = int | Literal["auto"] | None
"""A number of windows, `auto` for as many as the model needs, or None for all the text there is."""

DEFAULT_SEQ_LEN = 512
ROWS_PER_INPUT = 16
FEWEST, MOST = 32, 256
"""The smallest and largest number of windows that `auto` takes."""


def windows_for(
    model: Decoder,
    texts: Texts,
    *,
    windows: Count,
    seq_len: int | None = None,
    split: Split = "calibration",
    pack: bool = True,
    bos: Bos = "auto",
    options: RunOptions = DEFAULTS,
) -> Windows:
    """Open texts for a model: with its tokenizer, its vocabulary, its positions, and text that it writes itself.

    For a model opened only for an estimate, random tokens stand in for what it would write.

    Args:
        model: the open model.
        texts: a source, windows made before (returned as they are), or None for the default.
        windows: number of windows; `auto` as `windows_needed` says, None for all the text there is.
        seq_len: tokens in a window; None takes 512, or the model's positions if those are fewer.
        split: as in `open_texts`; so are `pack` and `bos`.
        pack: whether documents are joined.
        bos: whether windows begin with the beginning-of-sequence token.
        options: seed of the shuffling and of what the model writes; progress of its writing.

    Raises:
        InputError: an unknown source, too little text, windows the model cannot read, or a model that degenerates when
            it writes.
    """
    if isinstance(texts, Windows):
        return texts
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, model.max_positions or DEFAULT_SEQ_LEN)
    return open_texts(
        str(texts or DEFAULT_TEXTS),
        Reader(
            model.tokenizer,
            vocab_size=model.module.get_input_embeddings().num_embeddings,
            max_positions=model.max_positions,
            own=OwnText(model, options.progress),
        ),
        windows=windows_needed(model, seq_len) if windows == "auto" else windows,
        seq_len=seq_len,
        seed=options.seed,
        split=split,
        pack=pack,
        bos=bos,
    )


def windows_by_source(
    model: Decoder,
    texts: Texts,
    *,
    windows: Count,
    seq_len: int | None = None,
    options: RunOptions = DEFAULTS,
) -> tuple[Windows, ...]:
    """Open the held-out part of several sources separately: "a,b" are two here, and "a:0.7,b:0.3" one mixture.

    Args:
        model: the open model; it writes the text of "self".
        texts: as for `windows_for`.
        windows: number of windows of each source.
        seq_len: tokens in a window.
        options: progress of what the model writes; held-out text is read in order and written with seed 0.

    Raises:
        InputError: as `windows_for`.
    """
    sources = [texts] if isinstance(texts, Windows) else _separate(str(texts or DEFAULT_TEXTS))
    return tuple(
        windows_for(
            model,
            one,
            windows=windows,
            seq_len=seq_len,
            split="held-out",
            options=RunOptions(progress=options.progress),
        )
        for one in sources
    )


def _separate(source: str) -> list[Texts]:
    if source == DIVERSE:
        source, _ = parts_of_diverse(len(DIVERSE), "held-out", None)
    if is_source(source):
        return [source]
    found = _listed(source)
    return [source] if any(weight is not None for _, weight in found) else [name for name, _ in found]


def windows_needed(model: Decoder, seq_len: int) -> int:
    """Return how many windows give every projection 16 tokens per input: fewer do not determine a least-squares repair.

    Each expert sees only the tokens that are routed to it. At least 32 windows, at most 256.
    """
    tokens = ROWS_PER_INPUT * rows_per_token(model)
    return min(max(FEWEST, math.ceil(tokens / seq_len)), MOST)


def without_own(windows: Windows) -> str:
    """Return the source of windows without the model's own text, to open more of it than a model would write."""
    others = [part for part in windows.parts if part != OWN]
    return ",".join(others) if others and OWN in windows.parts else windows.source
