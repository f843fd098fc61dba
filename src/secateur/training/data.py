"""Training data as items of a data set, memory-mapped tensors, the validation split, and the next-token loss."""

from __future__ import annotations

import errno
import math
import os
from typing import Protocol

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.files import require_room
from secateur.ownership import scratch_folder

_HELD_BACK = 0.05
_MOST_HELD_BACK = 128


class WindowData(Dataset[dict[str, torch.Tensor]]):
    """Windows as items: `tokens` (T,), and `mask` (T,) where some are padded."""

    def __init__(self, windows: Windows, numbers: range | None = None) -> None:
        """Wrap all windows, or those with these numbers."""
        self.windows = windows
        self.numbers = range(len(windows)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        number = self.numbers[item]
        found = {"tokens": self.windows.tokens[number]}
        if self.windows.mask is not None:
            found["mask"] = self.windows.mask[number]
        return found


class Counted(Protocol):
    """Anything with a source and a number of windows."""

    @property
    def source(self) -> str:
        """What the user typed."""

    def __len__(self) -> int: ...


def split_off_validation(windows: Counted) -> tuple[range, range]:
    """Split window numbers into those to train on and the last ones, one in twenty and at most 128, to hold out.

    Raises:
        InputError: fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(f"{windows.source}: {len(windows)} window to train on; some must be held out, give more text.")
    back = max(1, min(_MOST_HELD_BACK, round(_HELD_BACK * len(windows))))
    return range(len(windows) - back), range(len(windows) - back, len(windows))


IGNORED = -100
"""Label of a position that the loss ignores."""


class LanguageModelling(nn.Module):
    """Next-token loss of a causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model, whose parameters that require gradients are trained."""
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of losses in nats and the number of predictions.

        Args:
            tokens: int64 (batch, positions).
            mask: bool, True at real tokens; None if nothing is padded.
            labels: target of each position, -100 to ignore it; None takes all real tokens.
        """
        given = {} if mask is None else {"attention_mask": mask.long()}
        scores = self.model(input_ids=tokens, use_cache=False, **given).logits
        return language_loss(scores, targets_of(tokens, mask, labels))


def targets_of(tokens: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
    """Return the target of each position but the last, (batch, positions - 1), -100 where there is none."""
    targets = (tokens if labels is None else labels)[:, 1:]
    return targets if mask is None else targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)


def language_loss(scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of logits (batch, positions, vocabulary), and the number of predictions."""
    flat = scores[:, :-1].float().flatten(0, 1)
    total = nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    return total, (targets != IGNORED).sum()


class MappedTensors:
    """A temporary folder of memory-mapped tensors; it is deleted with the object.

    Attributes:
        folder: the folder.
    """

    def __init__(self, what: str, needed: int) -> None:
        """Open an empty folder.

        Args:
            what: description of the data, for the name and for the error.
            needed: bytes it will take.

        Raises:
            OSError: there is not enough room.
        """
        self.folder = scratch_folder(what.replace(" ", "-"), self)
        require_room(self.folder, needed, f"{what} ({needed / 2**30:.1f} GiB)")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a new file-backed tensor of zeros.

        Its room is taken now: on a full disk, writing to mapped memory would kill the process.

        Raises:
            OSError: there is not enough room.
        """
        path = self.folder / name
        with path.open("wb") as file:
            _reserve(file.fileno(), math.prod(shape) * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _reserve(handle: int, size: int) -> None:
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
            raise
