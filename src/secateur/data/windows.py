"""Windows of tokens: what every measurement reads.

Shapes: W windows of T tokens (the beginning-of-sequence token included).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens, on the CPU, and everything needed to get the same ones again.

    Attributes:
        tokens: int64 (W, T).
        mask: bool (W, T), True for real tokens; None if nothing is padded.
        source: what the user typed.
        fingerprint: where the text is from and the sha256 of tokens, mask and shape: equal fingerprints mean
            equal windows, e.g. "python-stdlib(python 3.11.7, calibration):sha256:0123456789abcdef".
        seed: seed of the shuffling; None if nothing was shuffled.
        bos: whether the beginning-of-sequence token starts each window.
        notes: messages for the user, e.g. "last 131 tokens dropped".
        parts: the sources of a mixture; empty for a single source.
        part_of: int64 (W,), which of `parts` each window is from; None for a single source.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    source: str
    fingerprint: str
    seed: int | None
    bos: bool
    notes: tuple[str, ...] = ()
    given: bool = False
    """Made by `of`: the source is a name for the reader and cannot be opened for more."""
    parts: tuple[str, ...] = ()
    part_of: torch.Tensor | None = None

    @classmethod
    def of(cls, tokens: Any, mask: Any = None, source: str = "tokens", *, bos: bool = False) -> Windows:
        """Wrap existing windows: tensors, arrays or nested lists, (W, T), used exactly as given.

        Raises:
            InputError: tokens are not a non-empty table of non-negative integers, or the mask is not a table
                of booleans of the same shape with at least one True in each window.
        """
        tokens_WT = _checked_tokens(_tensor(tokens, source), source)
        mask_WT = None if mask is None else _checked_mask(_tensor(mask, source), tokens_WT)
        return cls(tokens_WT, mask_WT, source, f"{source}:{digest(tokens_WT, mask_WT)}", None, bos, given=True)

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in a window, padding and beginning-of-sequence token included."""
        return self.tokens.shape[1]

    @property
    def token_count(self) -> int:
        """Tokens in all windows, padding not counted."""
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())

    def token_counts(self) -> torch.Tensor:
        """Return the tokens of each window, padding not counted, (W,) int64."""
        return torch.full((len(self),), self.seq_len) if self.mask is None else self.mask.sum(dim=1)

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield (tokens, mask) of `size` windows at a time, the last batch possibly smaller; views, not copies."""
        if size < 1:
            raise InputError(f"a batch needs at least one window, not {size}")
        masks = [None] * len(self) if self.mask is None else self.mask.split(size)
        return zip(self.tokens.split(size), masks, strict=False)

    def some(self, numbers: Iterable[int]) -> Windows:
        """Return the windows of these numbers, with the fingerprint of the whole."""
        rows = list(numbers)
        return replace(
            self,
            tokens=self.tokens[rows],
            mask=None if self.mask is None else self.mask[rows],
            part_of=None if self.part_of is None else self.part_of[rows],
        )

    def at_most(self, count: int) -> Windows:
        """Return so many of the windows, evenly of each source; all if there are no more."""
        return self if len(self) <= count else self.split_off(count / len(self))[1]

    def shortened(self, length: int) -> Windows:
        """Return the first `length` tokens of each window; they have a fingerprint of their own."""
        if length >= self.seq_len:
            return self
        return replace(
            self,
            tokens=self.tokens[:, :length],
            mask=None if self.mask is None else self.mask[:, :length],
            fingerprint=f"{self.fingerprint}, first {length} tokens",
        )

    def split_off(self, share: float) -> tuple[Windows, Windows]:
        """Split into the windows that stay and a share, evenly spaced, that is held back.

        Of a mixture each source gives its share, at least one window if it has two. Each part has a fingerprint of its
        own.

        Raises:
            InputError: fewer than two windows, or of every source of a mixture.
        """
        sources = (
            [torch.arange(len(self))]
            if self.part_of is None
            else [(self.part_of == part).nonzero().flatten() for part in self.part_of.unique()]
        )
        back: list[int] = []
        for numbers in sources:
            some = min(max(1, round(share * len(numbers))), len(numbers) - 1)
            back += [int(numbers[(number + 1) * len(numbers) // some - 1]) for number in range(some)]
        if not back:
            count = counted(len(self), "window")
            raise InputError(f"{self.source}: {count}, and some must be held back; give more text.")
        stay = [number for number in range(len(self)) if number not in back]
        every = f"{len(self) / len(back):.3g}th"
        parts = {f"without every {every}": stay, f"every {every}": back}
        left, held = (
            replace(self.some(rows), fingerprint=f"{self.fingerprint}, {which}") for which, rows in parts.items()
        )
        return left, held

    def describe(self) -> dict[str, Any]:
        """Return all but the tokens, ready for JSON."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "windows": len(self),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "bos": self.bos,
            "notes": list(self.notes),
        }


def load_windows(
    source: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: int | None,
    seq_len: int,
    vocab_size: int | None,
    max_positions: int | None,
) -> Windows:
    """Read a .npy file of token ids (W, T) and use it exactly as it is.

    Raises:
        InputError: the file cannot be read, holds something else, or does not suit the model.
    """
    tokens_WT = _checked_tokens(_load_array(Path(path).expanduser()), path)
    count, length = tokens_WT.shape
    if max_positions is not None and length > max_positions:
        raise InputError(
            f"the windows of {path} have {length} tokens, the model has {max_positions} positions; cut them"
        )
    check_vocabulary(tokens_WT, vocab_size, path)
    bos_id = None if tokenizer is None else tokenizer.bos_token_id
    bos = bos_id is not None and bool((tokens_WT[:, 0] == bos_id).all())
    as_asked = (count, length) == (windows, seq_len)
    notes = () if as_asked else (f"used as given: {counted(count, 'window')} of {length} tokens",)
    fingerprint = f"{Path(path).name}:{digest(tokens_WT, None)}"
    return Windows(tokens_WT, None, source, fingerprint, None, bos, notes)


def _load_array(path: Path) -> torch.Tensor:
    try:
        if not path.is_file():
            reason = "not an ordinary file" if path.exists() else "no such file"
            raise InputError(f"cannot read {path}: {reason}; save it with numpy.save(path, windows)")
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # claims more than the file holds? then it refuses
        if not isinstance(mapped, np.ndarray):
            raise ValueError("several arrays")
        return _tensor(np.array(mapped), str(path))
    except InputError:
        raise
    except Exception as error:  # a damaged header makes numpy raise errors of Python's own parser, too
        raise InputError(f"cannot read {path}: {first_line(error)}; save it with numpy.save(path, windows)") from error


def _tensor(values: Any, source: str) -> torch.Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: not a table of numbers ({error})") from error


def _checked_tokens(tokens: torch.Tensor, source: str) -> torch.Tensor:
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise InputError(f"{source}: token ids must be integers, not {_dtype(tokens)}")
    if tokens.ndim != 2 or not tokens.numel():
        raise InputError(f"{source}: token ids must be a table (windows, tokens), not {tuple(tokens.shape)}")
    tokens = tokens.to(torch.int64, copy=True).contiguous()
    if tokens.min() < 0:
        raise InputError(f"{source}: token ids must not be negative, one is {tokens.min()}")
    return tokens


def _checked_mask(mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        raise InputError(f"the mask must be booleans {tuple(tokens.shape)}, not {_dtype(mask)} {tuple(mask.shape)}")
    if not mask.any(dim=1).all():
        raise InputError("the mask leaves a window without any token")
    return mask.clone().contiguous()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_vocabulary(tokens: torch.Tensor, vocab_size: int | None, origin: str) -> None:
    """Refuse tokens outside the vocabulary of the model.

    Raises:
        InputError: naming their origin.
    """
    if vocab_size is not None and tokens.max() >= vocab_size:
        raise InputError(
            f"{origin} gives token id {tokens.max()}, but the model knows only {vocab_size}; is it made for this model?"
        )


def digest(tokens: torch.Tensor, mask: torch.Tensor | None) -> str:
    """Return "sha256:" and 16 hex digits over shape, tokens (little-endian int64) and mask (bytes)."""
    found = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    found.update(tokens.numpy().astype("<i8").tobytes())
    if mask is not None:
        found.update(mask.numpy().tobytes())
    return f"sha256:{found.hexdigest()[:16]}"


def counted(number: int, noun: str) -> str:
    """Format a number of things: `1 window`, `2 windows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
