"""Documents → windows of tokens: joined, tokenised once and cut; or one document in each window; or mixtures of both.

Shapes: W windows of T tokens (`seq_len`, the beginning-of-sequence token included).
"""

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch

from secateur.data.documents import Documents, Split
from secateur.data.mixtures import apportion
from secateur.data.own_text import OwnText
from secateur.data.sources import OWN, open_documents
from secateur.data.windows import Windows, check_vocabulary, counted, digest
from secateur.errors import InputError, first_line, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]

BETWEEN_DOCUMENTS = "\n\n"
SHORTEST = 8  # tokens: a shorter window, or a shorter document of its own, says nothing about a model
MARGIN = 64  # tokens at the end of a truncated text that are not used: the cut may have split a word


@dataclass(frozen=True)
class Cutting:
    """How documents become windows: the settings of `open_texts` in `texts.py`, checked."""

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
        """Tokens of text in a window."""
        return self.seq_len - self.bos


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


def cut(source: str, part: str, count: int | None, cutting: Cutting) -> Windows:
    """Open one part of `source` and cut it into at most `count` windows, or all there are if that is None.

    Raises:
        InputError: the part cannot be read, or holds too little text.
    """
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


def _own(source: str, count: int | None, cutting: Cutting) -> Windows:
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


_Rows = tuple[list[list[int]], torch.Tensor | None, list[str]]


def _packed(documents: Documents, count: int | None, cutting: Cutting) -> _Rows:
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


def _one_each(documents: Documents, count: int | None, cutting: Cutting) -> _Rows:
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


def mixed(source: str, shares: dict[str, float], windows: int | None, cutting: Cutting) -> Windows:
    """Cut each part's share of the windows and combine them; calibration windows are shuffled.

    Raises:
        InputError: no number of windows, finished windows as a part, or as in `cut`.
    """
    if windows is None:
        raise InputError(f"'{source}' is a mixture: its shares are of a number of windows, so give one")
    if given := [name for name in shares if name.lower().endswith(".npy")]:
        raise InputError(f"{given[0]} holds finished windows and cannot be part of a mixture")
    counts = apportion(list(shares.values()), windows)
    parts = [cut(name, name, count, cutting) for name, count in zip(shares, counts, strict=True)]
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
