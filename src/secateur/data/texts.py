"""Named or local texts → windows of tokens, seeded and fingerprinted.

Shapes: W windows of T tokens (`seq_len`, the beginning-of-sequence token included).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from secateur.data.cutting import SHORTEST, Bos, Cutting, cut, mixed, wants_bos
from secateur.data.diverse import parts_of_diverse
from secateur.data.documents import Split
from secateur.data.mixtures import shares_in, weights_in
from secateur.data.own_text import OwnText
from secateur.data.sources import DIVERSE, OWN, is_source
from secateur.data.windows import Windows, load_windows
from secateur.errors import InputError, unknown
from secateur.models.decoder import Decoder
from secateur.models.widths import rows_per_token
from secateur.run_options import DEFAULTS, RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    shares = shares_in(source)
    first = next(iter(shares))
    if len(shares) == 1 and first.lower().endswith(".npy"):
        return load_windows(source, first, tokenizer, windows, seq_len, reader.vocab_size, reader.max_positions)
    _check_sizes(windows, seq_len, reader.max_positions)
    if split not in ("calibration", "held-out"):
        raise unknown("split", split, ["calibration", "held-out"])
    if tokenizer is None:
        raise InputError(f"no tokenizer to read '{source}' with; give one, or a .npy file of token ids")
    cutting = Cutting(tokenizer, seq_len, seed, split, pack, wants_bos(tokenizer, bos), reader.vocab_size, reader.own)
    if len(shares) == 1:
        return cut(source, first, windows, cutting)
    return mixed(source, shares, windows, cutting)


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


Texts = str | Path | Windows | None
"""A source as in `secateur texts`, windows made before, or None for `DEFAULT_TEXTS`."""

DEFAULT_TEXTS = DIVERSE
"""The default source: nobody should repair a model on a single kind of text without having asked for it."""

Count = int | Literal["auto"] | None
"""A number of windows, `auto` for as many as the model needs, or None for all the text there is."""

DEFAULT_SEQ_LEN = 512
ROWS_PER_INPUT = 32
"""Tokens per input of the widest projection: three times 10 take a quarter off the excess of SmolLM2-135M."""
FEWEST, MOST = 32, 128
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
    found = weights_in(source)
    return [source] if any(weight is not None for _, weight in found) else [name for name, _ in found]


def windows_needed(model: Decoder, seq_len: int) -> int:
    """Return how many windows give every projection 32 tokens per input: a least-squares repair of fewer fits noise.

    Each expert sees only the tokens that are routed to it. At least 32 windows, and at most 128, four times as long.
    """
    tokens = ROWS_PER_INPUT * rows_per_token(model)
    return min(max(FEWEST, math.ceil(tokens / seq_len)), MOST)


def without_own(windows: Windows) -> str:
    """Return the source of windows without the model's own text, to open more of it than a model would write."""
    others = [part for part in windows.parts if part != OWN]
    return ",".join(others) if others and OWN in windows.parts else windows.source
