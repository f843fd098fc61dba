"""Run a block once for several output projections of its MLP.

A block whose MLP writes the residual stream directly leaves r + W x. Once r and x are known, what it leaves with
another W' needs no second run, and is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, step, through_block
from secateur.models.anatomy import find, residual_factor
from secateur.models.decoder import Decoder
from secateur.models.forward import require_finite
from secateur.surgery.width.inputs import holding, writer_of, writes_stream


@dataclass(frozen=True)
class Exchange:
    """A block whose output projection is exchanged after it was run.

    Attributes:
        decoder: the model; the weights of the block are loaded.
        index: the block.
        store: holds the states that enter the block, under the index of each batch.
    """

    decoder: Decoder
    index: int
    store: StateStore

    @classmethod
    def possible(cls, decoder: Decoder, index: int) -> bool:
        """Return whether the MLP of a block writes the residual stream last, by one projection, without a norm."""
        writer = find(decoder.block_list[index], writer_of(decoder, index, "channels"))
        last = writes_stream(decoder) and not decoder.anatomy.parallel
        return last and isinstance(writer, nn.Linear | Conv1D)

    def run(self, batch: Batch) -> torch.Tensor:
        """Run the block and return what it leaves; r and x take the place of what entered, if memory has room for x.

        Raises:
            NumericsError: NaN or infinity; the message names the block.
        """
        found: list[torch.Tensor] = []

        def silence(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            found.extend((args[0], output))
            return torch.zeros_like(output)

        hook = self._writer.register_forward_hook(silence)
        try:
            rest = step(self.decoder, self.index, batch, self.store.get(batch.index))
        finally:
            hook.remove()
        inputs, written = found
        if self.store.has_room(inputs):
            self.store.put(batch.index, rest)
            self.store.put(_inputs_of(batch), inputs)
        return self._left(batch, rest, written)

    def advance(self, edits: Mapping[str, torch.Tensor], batches: Sequence[Batch]) -> None:
        """Put what the block leaves with other parameters into the store.

        Args:
            edits: of the block. Those outside the MLP's output projection were in place when it was run.
            batches: all of them; those whose r and x are not known are run.

        Raises:
            NumericsError: NaN or infinity; the message names the block.
        """
        with holding(self.decoder.block_list[self.index], edits):
            for batch in batches:
                if _inputs_of(batch) not in self.store:
                    through_block(self.decoder, self.index, [batch], self.store)
                    continue
                written = self._writer(self.store.get(_inputs_of(batch)))
                self.store.drop(_inputs_of(batch))
                self.store.put(batch.index, self._left(batch, self.store.get(batch.index), written))

    @property
    def _writer(self) -> nn.Module:
        found: nn.Module = find(self.decoder.block_list[self.index], writer_of(self.decoder, self.index, "channels"))
        return found

    def _left(self, batch: Batch, rest: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        factor = residual_factor(self.decoder.config, self.decoder.anatomy.family)
        hidden = rest + (written if factor == 1 else factor * written).view(rest.shape)
        require_finite(hidden, f"the output of block {self.index}", batch.mask)
        return hidden


def _inputs_of(batch: Batch) -> tuple[int, str]:
    return batch.index, "inputs"
