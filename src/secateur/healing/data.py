"""What a run is trained on: windows of tokens, as items of a data set."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.utils.data import Dataset

from secateur.calibration.windows import Windows
from secateur.errors import InputError

_HELD_BACK = 0.05
_MOST_HELD_BACK = 128


class WindowData(Dataset[dict[str, torch.Tensor]]):
    """Windows as items: `tokens` (T,), and `mask` (T,) where some are padded."""

    def __init__(self, windows: Windows, numbers: range | None = None) -> None:
        """Take all windows, or those of these numbers."""
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
    """Anything that counts its windows and knows where they are from."""

    @property
    def source(self) -> str:
        """What the user typed."""

    def __len__(self) -> int: ...


def split_off_validation(windows: Counted) -> tuple[range, range]:
    """Give the numbers of the windows to train on and of those held back: one in twenty, at most 128, the last ones.

    Raises:
        InputError: fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(
            f"{windows.source}: {len(windows)} window to train on; some must be held back, give more text."
        )
    back = max(1, min(_MOST_HELD_BACK, round(_HELD_BACK * len(windows))))
    return range(len(windows) - back), range(len(windows) - back, len(windows))
