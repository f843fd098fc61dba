"""Pairs of hidden states, the input and output of a window of blocks, on which a replacement module is trained.

LLM-Streamline trains on such pairs (Chen et al. 2024, section 3.2). They need not fit in memory: a model in memory
recomputes them for each batch, a skeleton computes them once and keeps them in memory-mapped files in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.utils.data import Dataset

from secateur.calibration.reading_points import centred
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, stored_start, through_block
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.models.depth import first_sharing
from secateur.models.forward import Call, capture, run_block
from secateur.plan.steps import Span
from secateur.run_options import DEFAULTS, RunOptions
from secateur.training.data import MappedTensors


def pair_bytes(windows: int, seq_len: int, width: int) -> int:
    """Return the bytes on disk of the pairs of so many windows: two states of `width` bfloat16 values per token."""
    return 2 * windows * seq_len * width * 2


class StoredPairs(MappedTensors):
    """Input and output states of every window of text, in bfloat16.

    Attributes:
        entering, leaving: (W, T, d).
    """

    def __init__(self, windows: int, seq_len: int, width: int) -> None:
        """Make room for so many windows.

        Raises:
            OSError: there is none.
        """
        super().__init__("hidden-states", pair_bytes(windows, seq_len, width))
        self.entering, self.leaving = (
            self.tensor(name, (windows, seq_len, width), torch.bfloat16) for name in ("entering", "leaving")
        )


@torch.no_grad()
def store_pairs(decoder: Decoder, windows: Windows, window: Span, *, options: RunOptions = DEFAULTS) -> StoredPairs:
    """Run a model up to the end of a window of blocks and keep the states at both ends.

    Raises:
        OSError: there is no room for them.
        NumericsError: NaN or infinity on the way.
    """
    low, high = window
    pairs = StoredPairs(len(windows), windows.seq_len, decoder.state_size)
    with open_store(decoder) as store:
        walk = Rows.start(decoder, windows, store, options.batch_size)
        for index in options.progress(range(high + 1), "keeping hidden states", high + 1):
            if index == low:
                walk.write(pairs.entering)
            walk.through(index)
        walk.write(pairs.leaving)
    return pairs


@dataclass
class Rows:
    """The states of all windows as they advance through a model block by block.

    Attributes:
        decoder: the model.
        store: holds the state of each batch under its index.
        batches: in the order of the windows.
    """

    decoder: Decoder
    store: StateStore
    batches: list[Batch]

    @classmethod
    def start(cls, decoder: Decoder, windows: Windows, store: StateStore, batch_size: int | None = None) -> Rows:
        """Store the input of block 0."""
        return cls(decoder, store, stored_start(decoder, windows, store, batch_size))

    def through(self, index: int) -> None:
        """Run all windows through block `index`."""
        with self.decoder.block(index):
            through_block(self.decoder, index, self.batches, self.store)

    def write(self, target: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """Write the current states of all windows to a tensor (W, T, d), optionally transformed."""
        rows = 0
        for batch in self.batches:
            state = self.store.get(batch.index)
            target[rows : rows + len(state)] = (state if turn is None else turn(state)).to(target.dtype).cpu()
            rows += len(state)


class PairData(Dataset[dict[str, torch.Tensor]]):
    """Items of another data set, each with its pair of states."""

    def __init__(self, items: Dataset[dict[str, torch.Tensor]], pairs: StoredPairs, numbers: range) -> None:
        """Join items with the pairs with these numbers."""
        self.items, self.pairs, self.numbers = items, pairs, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        number = self.numbers[item]
        return self.items[item] | {"entering": self.pairs.entering[number], "leaving": self.pairs.leaving[number]}


class BlockNetwork(nn.Module):
    """Blocks in a row, called with the arguments recorded for them."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Wrap blocks."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @classmethod
    def copy_of(cls, decoder: Decoder, numbers: Iterable[int]) -> BlockNetwork:
        """Wrap float32 copies of these blocks, without Accelerate's hooks, that can be trained on any device."""
        copies = []
        for number in numbers:
            with decoder.block(number) as block:
                copies.append(remove_hook_from_module(copy.deepcopy(block), recurse=True).float().requires_grad_(True))
        return cls(copies)

    def forward(self, hidden: torch.Tensor, calls: Sequence[Call]) -> torch.Tensor:
        """Run them on states (batch, positions, d)."""
        for block, call in zip(self.blocks, calls, strict=False):
            hidden = run_block(block, call, hidden)
        return hidden


class PairRegression(nn.Module):
    """Mean squared error between a replacement module's output and the output of the window it replaces."""

    def __init__(self, decoder: Decoder, window: Span, network: nn.Module, *, folded: bool = False) -> None:
        """Set up the objective.

        Args:
            decoder: the dense model, which is not trained.
            window: first and last block of the window.
            network: replacement module; takes states (batch, positions, d) and the calls of the window's blocks.
            folded: whether states are those of the folded model: for LayerNorm models, without their mean over
                directions.
        """
        super().__init__()
        self.network = network
        self._dense = (decoder,)  # in a tuple, so that its weights do not become part of this module
        self.window, self.folded = window, folded

    def train(self, mode: bool = True) -> PairRegression:
        """Stay in evaluation mode: dropout would be part of the error."""
        return super().train(False)

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        entering: torch.Tensor | None = None,
        leaving: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of squared errors at real tokens, and the number of values summed."""
        (decoder,), (low, high) = self._dense, self.window
        alone = high < first_sharing(decoder.config, decoder.anatomy.family)  # else earlier blocks compute keys, values
        with torch.no_grad():
            hidden, calls = capture(decoder, tokens, mask)
            if entering is None or leaving is None or not alone:
                entering, leaving = self._states(decoder, hidden, calls)
            entering, leaving = (one.to(hidden.device).float() for one in (entering, leaving))
            if self.folded:
                entering, leaving = centred(decoder, entering), centred(decoder, leaving)
        errors = (self.network(entering, calls[low : high + 1]).float() - leaving).square()
        if mask is not None:
            errors = errors[mask]
        return errors.sum(), torch.tensor(errors.numel(), device=errors.device)

    def _states(self, decoder: Decoder, hidden: torch.Tensor, calls: list[Call]) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.window
        entering = hidden
        for index in range(high + 1):
            entering = hidden if index == low else entering
            with decoder.block(index) as block:
                hidden = run_block(block, calls[index], hidden)
        return entering, hidden
