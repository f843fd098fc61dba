"""Rotate and slice hidden states with a basis of its own at every reading point.

Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", sections 3 and 4. At each
point where the residual stream is read, Q are the eigenvectors of Σ HᵀH, largest eigenvalue first, and P its first d
columns. Readers become `W P`, writers `Pᵀ W`, and the residual connection between two bases `P_inᵀ P_out`, a shortcut
matrix. Points are numbered in order: attention and MLP of each block (one point if they run in parallel), last the
head.

Legend: D = dense width of the stream, d = kept width, P (D, d) = kept orthonormal directions, H = states in the dense
coordinates (…, D), x = H P. The output of a branch is linear in its output projection, so each block's attention and
MLP run only once: on x, writing D directions, before P of the next point is known. Then `H' = x Pᵀ + branch(x)` is
measured, and the output projection is rotated and sliced afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.calibration.reading_points import centred, points_per_block
from secateur.calibration.shares import share_of
from secateur.calibration.statistics import real_tokens
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, mean_loss_of, open_store, start
from secateur.data.windows import Windows
from secateur.modeling import SecateurConfig
from secateur.models.decoder import Decoder
from secateur.models.families import FAMILIES
from secateur.models.forward import require_finite
from secateur.models.shards import OUTER
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.assembly import Assembly, Tensors
from secateur.surgery.hidden.directions import Covariance, Directions, Signals, principal_directions, times
from secateur.surgery.hidden.folding import (
    ATTENTION_READERS,
    ATTENTION_WRITER,
    folded_block,
    folded_config,
)
from secateur.surgery.hidden.outer import put_head, put_tables

_FAMILY = FAMILIES[SecateurConfig.model_type]


def rotate_readers(weights: Tensors, directions: Directions, *, attention: bool) -> Tensors:
    """Make attention's (or the MLP's) input projections read x = H P: `W ← W P`; biases are unchanged."""
    return {
        name: times(tensor, directions) if tensor.dim() == 2 and "_norm." not in name else tensor
        for name, tensor in weights.items()
        if _reads(name, attention=attention)
    }


def rotate_writers(weights: Tensors, directions: Directions, *, attention: bool) -> Tensors:
    """Make attention (or the MLP) write in the coordinates of P: `W ← Pᵀ W`, `b ← Pᵀ b`."""
    return {
        name: times(tensor.T, directions).T if tensor.dim() == 2 else times(tensor, directions)
        for name, tensor in weights.items()
        if _writes(name, attention=attention)
    }


def _reads(name: str, *, attention: bool) -> bool:
    if attention:
        return name.startswith((*ATTENTION_READERS, "self_attn.q_norm", "self_attn.k_norm"))
    return name.startswith("mlp.") and "down_proj" not in name


def _writes(name: str, *, attention: bool) -> bool:
    return name.startswith(ATTENTION_WRITER) if attention else "down_proj" in name


@dataclass
class _Pass:
    """One walk over the windows through the model that is being sliced."""

    assembly: Assembly
    store: StateStore
    batches: list[Batch]
    signals: Signals

    def through(self, directions: Directions, branch: Callable[[torch.Tensor, Batch], torch.Tensor]) -> torch.Tensor:
        """Advance every batch past one reading point: keep P, add the branch; return the covariance of the result."""
        covariance = Covariance(directions.shape[0], self.signals)
        kept = directions.to(self.assembly.dense.device, self.assembly.dense.module.dtype)
        for batch in self.batches:
            sliced = self.store.get(batch.index) @ kept
            hidden = sliced @ kept.T + branch(sliced, batch)
            self.store.put(batch.index, hidden)
            covariance.update(*real_tokens([hidden], batch.mask))
        covariance.combine()
        return covariance.matrix()


@torch.no_grad()
def slice_by_principal_directions(
    decoder: Decoder,
    windows: Windows,
    widths: Sequence[int],
    head_width: int,
    *,
    signals: Signals = "raw",
    options: RunOptions = DEFAULTS,
) -> tuple[Decoder, float]:
    """Slice with a basis of its own at every reading point, measured on the model as sliced so far (SliceGPT).

    Args:
        decoder: the dense model; it is not changed.
        windows: calibration windows.
        widths: directions kept in each block, d at both its reading points.
        head_width: directions that the head reads; with all of them it keeps the dense coordinates.
        signals: whether principal directions are those of the states before or after the norm.
        options: batch size and progress.

    Returns:
        The sliced model, and its mean loss in nats on the windows.

    Raises:
        ModelError: the family cannot be sliced.
        NumericsError: NaN or infinity on the way.
    """
    every = [width for width in widths for _ in range(points_per_block(decoder))]
    narrower = head_width if head_width < decoder.hidden_size else None
    assembly = empty_sliced(decoder, [*every, head_width], [True] * len(every))
    windows = share_of(windows)
    with open_store(decoder) as store:
        entering = _dense_start(decoder, windows, store, options.batch_size, signals)
        first = principal_directions(entering)[:, : every[0]]
        put_tables(assembly, first)
        batches = [batch for batch, _ in start(assembly.decoder, windows, options.batch_size)]
        assembly.finish(OUTER)
        walk = _Pass(assembly, store, batches, signals)
        kept = [imprint_of(first)]
        for index in options.progress(range(decoder.block_count), "slicing block by block", decoder.block_count):
            first = _slice_block(walk, index, first, widths[index], (*widths, narrower)[index + 1])
            assembly.finish(index)
            kept.append(imprint_of(first))
        read_by_head = None if narrower is None else first
        put_head(assembly, read_by_head)
        assembly.finish(OUTER)
        sliced = assembly.result(sliced_fingerprint(kept))
        with sliced.outer():
            return sliced, mean_loss_of(sliced, _final_states(walk, read_by_head), shared=True)


Imprint = tuple[int, list[float]]
"""Part of a fingerprint that identifies directions: their width, and some of their values."""


def imprint_of(directions: Directions) -> Imprint:
    """Return the width of directions and some of their values; all of them would grow with the model's depth."""
    some = directions.flatten()[:: max(1, directions.numel() // 64)]
    return directions.shape[1], [round(float(value), 6) for value in some]


def sliced_fingerprint(kept: Sequence[Imprint]) -> dict[str, Any]:
    """Return data that identifies the kept directions, for a fingerprint."""
    return {"widths": [width for width, _ in kept], "directions": [numbers for _, numbers in kept]}


def _dense_start(
    decoder: Decoder, windows: Windows, store: StateStore, batch_size: int | None, signals: Signals
) -> torch.Tensor:
    """Store the input of block 0, without its mean over directions for LayerNorm models."""
    covariance = Covariance(decoder.hidden_size, signals)
    for batch, hidden in start(decoder, windows, batch_size):
        hidden = centred(decoder, hidden)
        store.put(batch.index, hidden)
        covariance.update(*real_tokens([hidden], batch.mask))
    covariance.combine()
    return covariance.matrix()


def empty_sliced(
    dense: Decoder, widths: Sequence[int], shortcuts: Sequence[bool], stored: torch.dtype | None = None
) -> Assembly:
    """Start a sliced model of these widths at the reading points (the head last) and these shortcut matrices."""
    config = folded_config(dense)
    config.widths, config.shortcuts = list(widths), list(shortcuts)
    return Assembly(dense, config, _FAMILY, stored)


def _slice_block(walk: _Pass, index: int, first: Directions, width: int, following: int | None) -> Directions:
    """Slice one block; return the directions that the next block (or the head) reads."""
    assembly = walk.assembly
    where = assembly.block_path(index)
    with assembly.dense.block(index):
        weights = folded_block(assembly.dense, index)
    layer = assembly.layer(index)
    assembly.put(where, rotate_readers(weights, first, attention=True))
    writers = {name: one for name, one in weights.items() if "o_proj" in name or "down_proj" in name}
    assembly.put(where, writers)

    def attention(sliced: torch.Tensor, batch: Batch) -> torch.Tensor:
        return layer.attention_branch(sliced, **batch.calls[index].kwargs)

    def mlp(sliced: torch.Tensor, _: Batch) -> torch.Tensor:
        return layer.mlp_branch(sliced)

    if layer.parallel:
        assembly.put(where, rotate_readers(weights, first, attention=False))
        del weights
        leaving = walk.through(first, lambda sliced, batch: attention(sliced, batch) + mlp(sliced, batch))
        middle = last = _next_directions(leaving, following)
        second = first
    else:
        second = middle = principal_directions(walk.through(first, attention))[:, :width]
        assembly.put(where, rotate_readers(weights, middle, attention=False))
        del weights
        last = _next_directions(walk.through(middle, mlp), following)
        assembly.put(where, {"attn_shortcut.weight": (first.T @ middle).T})
    assembly.put(where, rotate_writers(writers, middle, attention=True))
    assembly.put(where, rotate_writers(writers, last, attention=False))
    assembly.put(where, {"mlp_shortcut.weight": (second.T @ last).T})
    return last


def _next_directions(covariance: torch.Tensor, width: int | None) -> Directions:
    """Return the directions of the next point; a whole head (width None) reads the dense coordinates."""
    if width is None:
        return torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    return principal_directions(covariance)[:, :width]


def _final_states(walk: _Pass, directions: Directions | None) -> Iterator[tuple[Batch, torch.Tensor]]:
    dense = walk.assembly.dense
    for batch in walk.batches:
        hidden = walk.store.get(batch.index)
        if directions is not None:
            hidden = hidden @ directions.to(dense.device, dense.module.dtype)
        require_finite(hidden, "the output of the last block", batch.mask)
        yield batch, hidden
