"""The loss with some blocks skipped, as Shortened LLaMA and SLEB use it, with nothing computed twice.

The input of block d depends only on which blocks *below* d are gone. States are therefore cached under the pair (blocks
gone below d, d), which holds the prefix of every candidate and whatever an earlier candidate computed. Only the blocks
above the first new gap are run.

Sources: Kim et al. 2024, "Shortened LLaMA", §3; Song et al. 2024, "SLEB", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, mean_loss_of, step, stored_start
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder

Gone = tuple[int, ...]
Key = tuple[int, int, Gone]


class RemovalProbe:
    """The loss of a decoder on fixed windows with any set of blocks skipped.

    Attributes:
        evaluated: block evaluations so far (one block on all windows).
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Windows,
        store: StateStore,
        batch_size: int | None = None,
        known: dict[Gone, float] | None = None,
    ) -> None:
        """Prepare the windows.

        Args:
            decoder: the model.
            windows: calibration windows.
            store: holds the cached states; closed by its owner.
            batch_size: windows per batch; None depends on the device.
            known: losses measured earlier on this model and these windows; new ones are added.
        """
        self.evaluated = 0
        self._decoder = decoder
        self._store = store
        self._settled: frozenset[int] = frozenset()
        self._losses: dict[Gone, float] = {} if known is None else known
        self._batches = stored_start(decoder, windows, store, batch_size, key=lambda batch: _key(batch, 0, ()))

    @torch.no_grad()
    def loss(self, gone: Iterable[int]) -> float:
        """Return the mean next-token loss in nats with these blocks skipped.

        Raises:
            NumericsError: NaN or infinity on the way; it never becomes a loss.
        """
        wanted = tuple(sorted(set(gone)))
        if wanted not in self._losses:
            self._losses[wanted] = self._measure(wanted)
        return self._losses[wanted]

    def fix(self, gone: Iterable[int]) -> None:
        """Remove these blocks for good, and drop states that no further candidate can use."""
        self._settled = frozenset(gone)
        for key in self._store.keys():  # noqa: SIM118 - not a dict
            depth, below = cast(Key, key)[1:]
            if not {block for block in self._settled if block < depth} <= set(below):
                self._store.drop(key)

    def _measure(self, gone: Gone) -> float:
        end = self._decoder.block_count
        depth = max(d for d in range(end + 1) if all(_key(b, d, gone) in self._store for b in self._batches))
        for index in range(depth, end):
            if index not in gone:
                self._advance(index, gone)
        with self._decoder.outer():
            last = ((batch, self._store.get(_key(batch, end, gone))) for batch in self._batches)
            return mean_loss_of(self._decoder, last)

    def _advance(self, index: int, gone: Gone) -> None:
        """Advance the states from the input of block `index` to the input of the next block.

        States of the model as pruned so far are always kept, those of a candidate only while memory has room.
        """
        with self._decoder.block(index):
            for batch in self._batches:
                before = _key(batch, index, gone)
                depth, below = before[1:]
                needed_again = set(below) == {block for block in self._settled if block < depth}
                result = step(self._decoder, index, batch, self._store.get(before))
                if not needed_again and not self._store.has_room(result):
                    self._store.drop(before)
                self._store.put(_key(batch, index + 1, gone), result)
        self.evaluated += 1


def _key(batch: Batch, depth: int, gone: Gone) -> Key:
    """Return the key of the input of block `depth`; right above a gap it is the state that entered the gap."""
    while depth - 1 in gone:
        depth -= 1
    return batch.index, depth, tuple(block for block in gone if block < depth)
