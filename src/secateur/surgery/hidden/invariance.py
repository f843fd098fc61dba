"""Check before any slicing that rotating the hidden states does not change the logits (SliceGPT, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.calibration.reading_points import centred, points_per_block
from secateur.errors import ModelError
from secateur.models.decoder import Decoder
from secateur.models.depth import block_kind
from secateur.models.forward import Call, capture, logits, run_block
from secateur.models.shards import OUTER
from secateur.surgery.assembly import Assembly
from secateur.surgery.hidden.directions import Directions, times
from secateur.surgery.hidden.folding import folded_block
from secateur.surgery.hidden.outer import put_head, put_tables
from secateur.surgery.hidden.own_bases import empty_sliced, rotate_readers, rotate_writers

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Allowed difference of logits, relative to the largest logit, by the dtype of the arithmetic."""

_WINDOWS, _POSITIONS = 2, 16

States = tuple[torch.Tensor, torch.Tensor]
"""Residual stream of the model itself, and of its rotated form."""


@torch.no_grad()
def rotation_error(decoder: Decoder) -> float:
    """Rotate a model at full width, with a random rotation at every reading point, and compare logits.

    This runs block by block: one block of the model and one of its rotated form are in memory at a time. To rotate a
    block takes its width times as many operations as it has weights, which is hours for a large model, so of blocks of
    one kind only the first, the middle and the last are; an error passes through the others as they are.

    Returns:
        Difference of logits on seeded random tokens, relative to the largest logit.

    Raises:
        ModelError: the family cannot be sliced.
    """
    points = points_per_block(decoder) * decoder.block_count
    width = decoder.hidden_size
    rotated = empty_sliced(decoder, [width] * (points + 1), [True] * points, stored=decoder.module.dtype)
    turns = [_random_rotation(width, seed) for seed in (0, 1)]
    tokens = _tokens(decoder)
    entering, calls = capture(decoder, tokens)
    put_tables(rotated, turns[0])
    turned, own_calls = capture(rotated.decoder, tokens)
    rotated.finish(OUTER)
    states, chosen = (entering, turned), _some_of_each_kind(decoder)
    for index, both in enumerate(zip(calls, own_calls, strict=True)):
        if index in chosen:
            states = _through_block(rotated, index, turns, both, states)
            rotated.release(rotated.block_path(index))
        else:
            states = _through_dense(decoder, index, turns, both[0], states)
    with decoder.outer():
        dense = logits(decoder, states[0], tokens).float()
    put_head(rotated, turns[points % 2])
    rotated.finish(OUTER)
    whole = rotated.result({})
    with whole.outer():
        found = logits(whole, states[1], tokens).float()
    return _difference(found, dense, exact=decoder.module.dtype == torch.float32)


def _difference(found: torch.Tensor, dense: torch.Tensor, *, exact: bool) -> float:
    """Return the largest difference relative to the largest logit; in half precision that of the median position.

    Some positions (mostly the first) have a few huge entries. A rotation spreads them over all directions, where half
    precision then rounds small entries away. A real mistake in a family shows at all positions.
    """
    if exact:
        return float((found - dense).abs().max() / dense.abs().max().clamp_min(1e-12))
    each = (found - dense).abs().amax(dim=-1) / dense.abs().amax(dim=-1).clamp_min(1e-12)
    return float("nan") if each.isnan().any() else float(each.flatten().median())


def _through_block(
    rotated: Assembly, index: int, turns: Sequence[Directions], calls: tuple[Call, Call], states: States
) -> States:
    """Run one block and its rotated form; even and odd reading points have different rotations."""
    decoder, where, points = rotated.dense, rotated.block_path(index), points_per_block(rotated.dense)
    with decoder.block(index) as block:
        expected = run_block(block, calls[0], states[0])
        weights = folded_block(decoder, index)
    for name, attention in (("attn", True), ("mlp", False)):
        point = points * index + (points == 2 and not attention)
        before, after = turns[point % 2], turns[(point + 1) % 2]
        rotated.put(where, rotate_readers(weights, before, attention=attention))
        rotated.put(where, rotate_writers(weights, after, attention=attention))
        if points == 2 or not attention:
            rotated.put(where, {f"{name}_shortcut.weight": (before.T @ after).T})
    return expected, run_block(rotated.layer(index), calls[1], states[1])


def _through_dense(decoder: Decoder, index: int, turns: Sequence[Directions], call: Call, states: States) -> States:
    """Run one block on both states, the rotated one turned back for it."""
    points = points_per_block(decoder)
    before, after = turns[points * index % 2], turns[points * (index + 1) % 2]
    with decoder.block(index) as block:
        expected = run_block(block, call, states[0])
        found = run_block(block, call, times(states[1], before.T).to(expected))
    return expected, times(centred(decoder, found), after).to(expected)


def _some_of_each_kind(decoder: Decoder) -> set[int]:
    """Return the first, middle and last block of each kind and shape."""
    kinds: dict[str, list[int]] = {}
    for index, block in enumerate(decoder.block_list):
        kind = block_kind(decoder.config, decoder.anatomy.family, index)
        shapes = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
        kinds.setdefault(f"{kind} {shapes}", []).append(index)
    return {one[place] for one in kinds.values() for place in (0, len(one) // 2, -1)}


def require_invariance(decoder: Decoder) -> None:
    """Refuse models whose logits change under rotation.

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
