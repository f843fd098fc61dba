"""Proof, before any cut, that rotating a model's hidden states leaves its logits alone (SliceGPT, section 3)."""

from __future__ import annotations

import torch

from secateur.calibration.reading_points import points_per_block
from secateur.errors import ModelError
from secateur.models.decoder import Decoder
from secateur.models.replay import capture, logits, run_block
from secateur.surgery.directions import Directions
from secateur.surgery.folding import folded_block
from secateur.surgery.hidden import empty_sliced, put_outer, rotate_readers, rotate_writers

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits allowed, relative to the largest logit, by the dtype of the arithmetic."""

_WINDOWS, _POSITIONS = 2, 16


@torch.no_grad()
def rotation_error(decoder: Decoder) -> float:
    """Rotate a model at full width, a random rotation at every reading point, and compare.

    Block by block, beside the model itself: one block of either is in memory at a time.

    Returns:
        Largest difference of logits on seeded random tokens, relative to the largest logit.

    Raises:
        ModelError: the family cannot be sliced.
    """
    points = points_per_block(decoder) * decoder.block_count
    width = decoder.hidden_size
    rotated = empty_sliced(decoder, [width] * (points + 1), [True] * points, stored=decoder.module.dtype)
    turns = [_random_rotation(width, seed) for seed in (0, 1)]
    put_outer(rotated, turns[0], turns[points % 2])
    tokens = _tokens(decoder)
    expected, calls = capture(decoder, tokens)
    found, own_calls = capture(rotated.decoder, tokens)
    for index in range(decoder.block_count):
        with decoder.block(index) as block:
            expected = run_block(block, calls[index], expected)
            weights = folded_block(decoder, index)
        where, first = rotated.block_path(index), points_per_block(decoder) * index
        for name, attention in (("attn", True), ("mlp", False)):
            point = first if attention or decoder.anatomy.parallel else first + 1
            before, after = turns[point % 2], turns[(point + 1) % 2]
            rotated.put(where, rotate_readers(weights, before, attention=attention))
            rotated.put(where, rotate_writers(weights, after, attention=attention))
            if not (attention and decoder.anatomy.parallel):
                rotated.put(where, {f"{name}_shortcut.weight": (before.T @ after).T})
        found = run_block(rotated.layer(index), own_calls[index], found)
        rotated.release(where)
    with decoder.outer():
        dense = logits(decoder, expected, tokens).float()
    difference = (logits(rotated.decoder, found, tokens).float() - dense).abs().max()
    return float(difference / dense.abs().max().clamp_min(1e-12))


def require_invariance(decoder: Decoder) -> None:
    """Stop unless rotation leaves the logits alone.

    Raises:
        ModelError: they change; nothing was cut.
    """
    error, allowed = rotation_error(decoder), TOLERANCE[decoder.module.dtype]
    if not error <= allowed:
        raise ModelError(
            f"{decoder.source}: rotating the hidden states changes the logits by {error:.1e} of the largest (allowed "
            f"{allowed:.0e}); this variant of {decoder.anatomy.family.model_type} cannot be sliced. Nothing was cut."
        )


def _random_rotation(width: int, seed: int) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q


def _tokens(decoder: Decoder) -> torch.Tensor:
    positions = min(_POSITIONS, decoder.max_positions or _POSITIONS)
    vocabulary = min(decoder.module.get_input_embeddings().num_embeddings, int(decoder.config.vocab_size))
    drawn = torch.randint(0, vocabulary, (_WINDOWS, positions), generator=torch.Generator().manual_seed(0))
    return drawn.to(decoder.device)
