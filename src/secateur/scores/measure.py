"""Measuring redundancy scores: a single pass for all that need neither removal nor gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secateur.calibration.shares import share_of, token_numbers
from secateur.calibration.statistics import AngularSums, CkaSums, CosineSums, real_tokens
from secateur.calibration.walk import check_windows, open_store, perplexity_of, states_by_batch
from secateur.data.windows import Windows
from secateur.distributed import process_count
from secateur.errors import InputError, ModelError, NumericsError, unknown
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.profile import KINDS, ONE_PASS, Kind, Matrix, Scores
from secateur.scores.removal import RemovalProbe
from secateur.scores.routing import routing_of
from secateur.scores.taylor import scored_weights, taylor


def score_model(
    decoder: Decoder, windows: Windows | None, kinds: Sequence[Kind] = ONE_PASS, *, options: RunOptions = DEFAULTS
) -> Scores:
    """Measure scores of a decoder; all kinds in `ONE_PASS` together take one pass.

    Args:
        decoder: the model.
        windows: calibration windows; None suffices for `magnitude`.
        kinds: what to measure, of `KINDS`.
        options: batch size, progress, and the seed of the tokens that CKA samples.

    Raises:
        InputError: an unknown kind, or no windows for a kind that needs them.
        ModelError: the model is sliced, and its states cannot be compared.
        NumericsError: NaN or infinity; it never becomes a score.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("score", kind, list(KINDS))
    found: dict[str, Any] = {}
    if "magnitude" in kinds:
        found["magnitude"] = weight_magnitudes(decoder)
    if windows is not None:
        check_windows(decoder, windows)
        if decoder.changes_basis and set(kinds) - {"taylor", "experts"}:
            raise ModelError(
                f"{decoder.source}: the states of this sliced model are in different bases and cannot be compared; "
                "score the dense model."
            )
        if set(kinds) & set(ONE_PASS):
            found |= _one_pass(decoder, windows, kinds, options)
        if "perplexity" in kinds:
            found |= _removal_perplexity(decoder, windows, options)
        if "taylor" in kinds:
            found["taylor"] = tuple(taylor(decoder, windows, options=options))
        if "experts" in kinds:
            found["routing"] = routing_of(decoder, windows, options)
    elif set(kinds) - {"magnitude"}:
        raise InputError(f"{', '.join(kinds)}: these scores need texts.")
    texts = None if windows is None else windows.describe()
    return Scores(model=decoder.source, fingerprint=decoder.fingerprint, texts=texts, **found)


def _one_pass(
    decoder: Decoder, windows: Windows, kinds: Sequence[Kind], options: RunOptions = DEFAULTS
) -> dict[str, Any]:
    states_count = decoder.block_count + 1
    cosine = CosineSums(states_count)
    angular = AngularSums(states_count)
    numbers = token_numbers(windows) if process_count() > 1 else None
    cka = CkaSums(windows.token_count, seed=options.seed, numbers=numbers) if "cka" in kinds else None
    for batch, states in states_by_batch(decoder, share_of(windows), options=options):
        flat = real_tokens(states, batch.mask)
        cosine.update(flat)
        angular.update(states, batch.mask)
        if cka is not None:
            cka.update(flat[1:])
    cosine.combine()
    angular.combine()
    if cka is not None:
        cka.combine()
    found: dict[str, Any] = {}
    if "cosine" in kinds:
        found["cosine"] = _rows(cosine.result())
    if "angular" in kinds:
        found["angular"] = _rows(angular.result())
    if "magnitude" in kinds:
        found["relative_magnitude"] = tuple(cosine.relative_magnitude().tolist())
    if cka is not None:
        found["cka_linear"] = _rows(cka.result("linear"))
        found["cka_rbf"] = _rows(cka.result("rbf"))
    return found


def _removal_perplexity(decoder: Decoder, windows: Windows, options: RunOptions = DEFAULTS) -> dict[str, Any]:
    with open_store(decoder) as store:
        probe = RemovalProbe(decoder, windows, store, options.batch_size)
        whole = perplexity_of(probe.loss(()))
        blocks = range(decoder.block_count)
        each = [
            perplexity_of(probe.loss((b,))) for b in options.progress(blocks, "leaving out each block", len(blocks))
        ]
    return {"perplexity": whole, "removal_perplexity": tuple(each)}


def weight_magnitudes(decoder: Decoder) -> tuple[float, ...]:
    """Return Σ|w| over the weight matrices and norms of each block (Shortened-LLaMA, Mag+).

    Raises:
        NumericsError: a block's weights hold NaN or infinity.
    """
    sums = []
    for index in range(decoder.block_count):
        with decoder.block(index) as block:
            rows = [weight.detach().abs().sum(dim=-1, dtype=torch.float32) for weight in scored_weights(block).values()]
            parts = [sums.cpu().double().sum() for sums in rows]
        total = torch.stack(parts).sum()
        if not torch.isfinite(total):
            raise NumericsError(f"the weights of block {index} hold NaN or infinity; the checkpoint is damaged.")
        sums.append(float(total))
    return tuple(sums)


def _rows(matrix: torch.Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())
