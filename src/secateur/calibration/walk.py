"""Run calibration windows through a decoder block by block, and compute losses from the final states.

Two orders give the same states: a model in memory takes one batch through all blocks, a skeleton takes all batches
through one block, so that each block's weights are read once per walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from secateur.calibration.store import StateStore
from secateur.data.windows import Windows
from secateur.distributed import add_up
from secateur.errors import InputError, NumericsError
from secateur.models.decoder import Decoder
from secateur.models.forward import Call, capture, logits, require_finite, run_block, same_calls
from secateur.run_options import DEFAULTS, RunOptions

_LOGIT_BYTES = 64 << 20
_NOT_PREDICTED = -100
"""Label ignored by the loss. It masks the last position, because slicing the logits would copy them."""
_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class Batch:
    """Some windows on the model's device.

    Attributes:
        index: number of the batch.
        tokens: int64, (windows, positions).
        mask: bool, same shape, True at real tokens; None where nothing is padded.
        calls: arguments of each block.
    """

    index: int
    tokens: torch.Tensor
    mask: torch.Tensor | None
    calls: Sequence[Call]


def batch_size_for(decoder: Decoder, windows: Windows, batch_size: int | None = None) -> int:
    """Return the windows per batch: the requested number, otherwise about 1024 tokens on a CPU and 16384 on a GPU."""
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}: must be at least 1.")
        return batch_size
    return max(1, _TOKENS_PER_BATCH.get(decoder.device.type, 4096) // windows.seq_len)


def check_windows(decoder: Decoder, windows: Windows) -> None:
    """Refuse windows that the model cannot read.

    Raises:
        InputError: longer than the model's positions, or token ids outside its vocabulary.
    """
    limit = decoder.max_positions
    if limit is not None and windows.seq_len > limit:
        raise InputError(
            f"windows of {windows.seq_len} tokens, but the model has {limit} positions; use --seq-len {limit}."
        )
    rows = decoder.module.get_input_embeddings().num_embeddings
    low, high = int(windows.tokens.min()), int(windows.tokens.max())
    if low < 0 or high >= rows:
        raise InputError(f"token ids from {low} to {high}, but the model's vocabulary has {rows}; wrong tokenizer?")


def open_store(decoder: Decoder) -> StateStore:
    """Open a store with a quarter of the free memory, or for a skeleton with half the size of its largest block."""
    if not decoder.is_skeleton:
        return StateStore()
    return StateStore(max(decoder.block_parameter_counts()) * decoder.module.dtype.itemsize // 2)


@contextmanager
def _given_or_new(store: StateStore | None, decoder: Decoder) -> Iterator[StateStore]:
    if store is not None:
        yield store
        return
    with open_store(decoder) as own:
        yield own


@torch.no_grad()
def start(decoder: Decoder, windows: Windows, batch_size: int | None = None) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield the batches, each with the residual stream entering block 0, X⁰."""
    check_windows(decoder, windows)
    calls: Sequence[Call] = ()
    with decoder.outer(head=False):
        for index, (tokens, mask) in enumerate(windows.batches(batch_size_for(decoder, windows, batch_size))):
            tokens = tokens.to(decoder.device)
            mask = None if mask is None else mask.to(decoder.device)
            hidden, found = capture(decoder, tokens, mask)
            require_finite(hidden, "what enters block 0 (the embeddings)", mask)
            calls = calls if same_calls(calls, found) else found
            yield Batch(index, tokens, mask, calls), hidden


def stored_start(
    decoder: Decoder,
    windows: Windows,
    store: StateStore,
    batch_size: int | None = None,
    *,
    key: Callable[[Batch], Hashable] = lambda batch: batch.index,
) -> list[Batch]:
    """Store the input of block 0 for each batch, by default under the batch's index; return the batches."""
    batches = []
    for batch, hidden in start(decoder, windows, batch_size):
        batches.append(batch)
        store.put(key(batch), hidden)
    return batches


def through_block(decoder: Decoder, index: int, batches: Iterable[Batch], store: StateStore) -> None:
    """Run block `index`, whose weights are present, on all batches; their states are in the store under their index.

    Raises:
        NumericsError: NaN or infinity; the message names the block.
    """
    for batch in batches:
        store.put(batch.index, step(decoder, index, batch, store.get(batch.index)))


@torch.no_grad()
def states_by_batch(
    decoder: Decoder, windows: Windows, *, store: StateStore | None = None, options: RunOptions = DEFAULTS
) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
    """Yield each batch with its L+1 residual states X⁰ … X^L, each (windows, positions, d).

    The last state is the output of the last block, *before* the final norm. A skeleton is run block by block, with the
    states in the store in between.

    Raises:
        NumericsError: a state holds NaN or infinity at a real token.
    """
    if not decoder.is_skeleton:
        count = -(-len(windows) // batch_size_for(decoder, windows, options.batch_size))
        for batch, hidden in options.progress(
            start(decoder, windows, options.batch_size), "walking the windows", count
        ):
            yield batch, _all_states(decoder, batch, hidden)
        return
    with _given_or_new(store, decoder) as kept:
        batches = walk_blocks(decoder, windows, kept, options=options)
        for batch in batches:
            keys = [(batch.index, depth) for depth in range(decoder.block_count + 1)]
            yield batch, [kept.get(key) for key in keys]
            for key in keys:
                kept.drop(key)


@torch.no_grad()
def walk_blocks(
    decoder: Decoder, windows: Windows, store: StateStore, *, only_last: bool = False, options: RunOptions = DEFAULTS
) -> list[Batch]:
    """Run all batches through one block after the other; states are stored under (batch, depth).

    Depth l is the input of block l; with `only_last`, each state is dropped once the next one is there.

    Raises:
        NumericsError: a state holds NaN or infinity at a real token.
    """
    batches = stored_start(decoder, windows, store, options.batch_size, key=lambda batch: (batch.index, 0))
    for index in options.progress(range(decoder.block_count), "walking the blocks", decoder.block_count):
        with decoder.block(index):
            for batch in batches:
                store.put((batch.index, index + 1), step(decoder, index, batch, store.get((batch.index, index))))
                if only_last:
                    store.drop((batch.index, index))
    return batches


@torch.no_grad()
def mean_loss(decoder: Decoder, windows: Windows, *, options: RunOptions = DEFAULTS) -> float:
    """Return the mean next-token loss in nats over all predictions of all windows.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    return mean_loss_of(decoder, last_states(decoder, windows, options))


@torch.no_grad()
def mean_loss_of_sources(decoder: Decoder, windows: Windows, *, options: RunOptions = DEFAULTS) -> float:
    """Return the mean over the sources of a mixture of their mean next-token losses in nats.

    Its exponential is the geometric mean of their perplexities: each source counts the same, however long it is.

    Raises:
        InputError: there is nothing to predict in one of them.
        NumericsError: NaN or infinity on the way.
    """
    if windows.part_of is None:
        return mean_loss(decoder, windows, options=options)
    sums, first = torch.zeros(2, int(windows.part_of.max()) + 1, dtype=torch.float64), 0
    for batch, hidden in last_states(decoder, windows, options):
        for row in range(len(batch.tokens)):
            one = slice(row, row + 1)
            mask = None if batch.mask is None else batch.mask[one]
            found, counted = loss_sum(decoder, replace(batch, tokens=batch.tokens[one], mask=mask), hidden[one])
            sums[:, windows.part_of[first + row]] += torch.stack((found, torch.tensor(float(counted))))
        first += len(batch.tokens)
    total, predictions = sums[:, windows.part_of.unique()]
    require_predictions(int(predictions.min()))
    return float((total / predictions).mean())


def mean_loss_of(decoder: Decoder, last: Iterable[tuple[Batch, torch.Tensor]], *, shared: bool = False) -> float:
    """Return the mean next-token loss in nats from the last block's output; skeletons need an open `decoder.outer()`.

    Args:
        decoder: the model.
        last: batches with the output of the last block.
        shared: whether they are only this process's share; the mean is then over all processes.

    Raises:
        InputError: there is nothing to predict.
        NumericsError: NaN or infinity.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for batch, hidden in last:
        found, counted = loss_sum(decoder, batch, hidden)
        sums += torch.stack((found, torch.tensor(float(counted), dtype=torch.float64)))
    if shared:
        add_up(sums)
    total, predictions = sums.tolist()
    require_predictions(int(predictions))
    return total / predictions


def require_predictions(predictions: int) -> None:
    """Refuse windows without anything to predict.

    Raises:
        InputError: there are no predictions.
    """
    if predictions == 0:
        raise InputError("windows of one token predict nothing; take at least two tokens per window.")


def perplexity_of(loss: float) -> float:
    """Return the perplexity, exp of a mean loss in nats.

    Raises:
        NumericsError: it overflows.
    """
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise NumericsError(
            f"a loss of {loss:.4g} nats per token has no perplexity; the weights may be damaged."
        ) from error


@torch.no_grad()
def last_states(
    decoder: Decoder, windows: Windows, options: RunOptions = DEFAULTS
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield each batch with the output of the last block, before the final norm; head and norm are loaded meanwhile.

    Raises:
        NumericsError: a state holds NaN or infinity at a real token.
    """
    if not decoder.is_skeleton:
        count = -(-len(windows) // batch_size_for(decoder, windows, options.batch_size))
        for batch, hidden in options.progress(
            start(decoder, windows, options.batch_size), "reading the windows", count
        ):
            for index in range(decoder.block_count):
                hidden = step(decoder, index, batch, hidden)
            yield batch, hidden
        return
    with open_store(decoder) as store:
        batches = walk_blocks(decoder, windows, store, only_last=True, options=options)
        with decoder.outer():
            for batch in batches:
                yield batch, store.get((batch.index, decoder.block_count))


def step(decoder: Decoder, index: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """Run block `index` (its weights present) on one batch and check for NaN and infinity.

    Raises:
        NumericsError: the message names the block.
    """
    result = run_block(decoder.block_list[index], batch.calls[index], hidden)
    require_finite(result, f"the output of block {index}", batch.mask)
    return result


def loss_sum(decoder: Decoder, batch: Batch, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of the next-token loss over the real tokens of a batch, given the last block's output.

    `decoder.outer()` must be open for a skeleton. Each window predicts its tokens from the second on.

    Returns:
        The sum in nats (a float64 scalar that carries gradients if `hidden` does) and the number of predictions.
    """
    total = torch.zeros((), dtype=torch.float64)
    predictions = 0
    for rows, part in parts_of(decoder, batch):
        targets = torch.full_like(part.tokens, _NOT_PREDICTED)
        targets[:, :-1] = part.tokens[:, 1:]
        if part.mask is not None:
            targets[:, :-1].masked_fill_(~(part.mask[:, 1:] & part.mask[:, :-1]), _NOT_PREDICTED)
        scores = logits(decoder, hidden[rows], part.tokens, part.mask).float()
        targets = targets.to(scores.device)
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")
        total = total + loss.cpu().double()
        predictions += int((targets != _NOT_PREDICTED).sum())
    require_finite(total.detach(), "the loss (final norm or head)")
    return total, predictions


def parts_of(decoder: Decoder, batch: Batch) -> Iterator[tuple[slice, Batch]]:
    """Split a batch into parts whose logits are not too large; yield the slice of windows and the smaller batch."""
    step = max(1, _LOGIT_BYTES // (4 * batch.tokens.shape[1] * int(decoder.config.vocab_size)))
    for first in range(0, len(batch.tokens), step):
        rows = slice(first, first + step)
        mask = None if batch.mask is None else batch.mask[rows]
        yield rows, replace(batch, tokens=batch.tokens[rows], mask=mask)


def _all_states(decoder: Decoder, batch: Batch, hidden: torch.Tensor) -> list[torch.Tensor]:
    states = [hidden]
    for index in range(decoder.block_count):
        states.append(step(decoder, index, batch, states[-1]))
    return states
