"""The loss with some blocks or branches skipped, with nothing computed twice.

The input of block d depends only on what is gone *below* d. States are therefore cached under the pair (what is gone
below d, d), which holds the prefix of every candidate and whatever an earlier candidate computed. Only the blocks above
the first new gap are run.

Sources: Kim et al. 2024, "Shortened LLaMA", §3; Song et al. 2024, "SLEB", algorithm 1; for attention and MLP apart
Zhong et al. 2024, "BlockPruner".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import cast

import torch

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, mean_loss_of, step, stored_start
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.surgery.width.coupling import Part
from secateur.surgery.width.inputs import holding, silenced

Branch = tuple[int, Part]
"""Attention ("heads") or the MLP ("channels") of a block."""
Gone = tuple[int | Branch, ...]
"""Blocks by number, and branches."""
_KEPT_BYTES = 4 << 30
"""States of candidates are kept up to so many bytes: they save a third of the blocks to run, at most."""
Key = tuple[int, int, Gone]
Last = Iterator[tuple[Batch, torch.Tensor]]
"""Batches with the output of the last block."""
Measure = Callable[[Decoder, Last], float]
"""What counts as the loss, from the output of the last block; final norm and head are loaded."""


class RemovalProbe:
    """The loss of a decoder on fixed windows with any set of blocks and branches skipped.

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
        measure: Measure = mean_loss_of,
    ) -> None:
        """Prepare the windows.

        Args:
            decoder: the model.
            windows: calibration windows.
            store: holds the cached states; closed by its owner.
            batch_size: windows per batch; None depends on the device.
            known: losses measured earlier on this model and these windows; new ones are added.
            measure: what counts as the loss.
        """
        self.evaluated = 0
        self._decoder = decoder
        self._store = store
        self._measured_by = measure
        self._settled: frozenset[int | Branch] = frozenset()
        self._losses: dict[Gone, float] = {} if known is None else known
        self._batches = stored_start(decoder, windows, store, batch_size, key=lambda batch: _key(batch, 0, ()))

    @torch.no_grad()
    def loss(self, gone: Iterable[int | Branch]) -> float:
        """Return the mean next-token loss in nats with these blocks and branches skipped.

        Raises:
            NumericsError: NaN or infinity on the way; it never becomes a loss.
        """
        wanted = _in_order(gone)
        if wanted not in self._losses:
            self._losses[wanted] = self._measure(wanted)
        return self._losses[wanted]

    def fix(self, gone: Iterable[int | Branch]) -> None:
        """Remove these for good, and drop states that no further candidate can use."""
        self._settled = frozenset(_in_order(gone))
        for key in self._store.keys():  # noqa: SIM118 - not a dict
            depth, below = cast(Key, key)[1:]
            if not _branches(_below(self._settled, depth)) <= _branches(below):
                self._store.drop(key)

    def _measure(self, gone: Gone) -> float:
        end = self._decoder.block_count
        depth = max(d for d in range(end + 1) if all(_key(b, d, gone) in self._store for b in self._batches))
        for index in range(depth, end):
            if index not in gone:
                self._advance(index, gone)
        with self._decoder.outer():
            last = ((batch, self._store.get(_key(batch, end, gone))) for batch in self._batches)
            return self._measured_by(self._decoder, last)

    def _advance(self, index: int, gone: Gone) -> None:
        """Advance the states from the input of block `index` to the input of the next block.

        States of the model as pruned so far are always kept, those of a candidate only while memory has room.
        """
        with self._decoder.block(index) as block, ExitStack() as silent:
            for part in [part for part in _PARTS if (index, part) in gone]:
                silent.enter_context(holding(block, silenced(self._decoder, index, part)))
            for batch in self._batches:
                before = _key(batch, index, gone)
                depth, below = before[1:]
                needed_again = set(below) == _below(self._settled, depth)
                result = step(self._decoder, index, batch, self._store.get(before))
                if not needed_again and not self._store.has_room(result, _KEPT_BYTES):
                    self._store.drop(before)
                self._store.put(_key(batch, index + 1, gone), result)
        self.evaluated += 1


_PARTS: tuple[Part, Part] = ("heads", "channels")


def _in_order(gone: Iterable[int | Branch]) -> Gone:
    """Return blocks and branches in order, each once; a block both of whose branches are gone counts as gone."""
    named = set(gone)
    whole = {one for one in named if isinstance(one, int)}
    whole |= {one[0] for one in named if isinstance(one, tuple) and all((one[0], part) in named for part in _PARTS)}
    left = {one for one in named if isinstance(one, tuple) and one[0] not in whole}
    return tuple(sorted(whole | left, key=lambda one: (one, "") if isinstance(one, int) else one))


def _block_of(one: int | Branch) -> int:
    return one if isinstance(one, int) else one[0]


def _below(gone: Iterable[int | Branch], depth: int) -> set[int | Branch]:
    return {one for one in gone if _block_of(one) < depth}


def _branches(gone: Iterable[int | Branch]) -> set[Branch]:
    """Return the branches that are gone, of whole blocks both."""
    return {(_block_of(one), part) for one in gone for part in _PARTS if isinstance(one, int) or one[1] == part}


def _key(batch: Batch, depth: int, gone: Gone) -> Key:
    """Return the key of the input of block `depth`; right above a gap it is the state that entered the gap."""
    while depth - 1 in gone:
        depth -= 1
    return batch.index, depth, tuple(one for one in gone if _block_of(one) < depth)
