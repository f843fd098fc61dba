"""What reads and what writes the residual stream of any architecture, found by shapes and proved on a small copy.

The trial gives a small copy a stream of fewer directions: what its tables and writers add lies in a random subspace.
Sliced to this subspace it must compute the same. That shows at once whether its hidden states can be rotated, whether
everything along the stream was found (`stream_shapes.py`), and whether the configuration can name the result.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from secateur.calibration.reading_points import reading_norms
from secateur.errors import ModelError, first_line
from secateur.models.anatomy import Family, Stream, find
from secateur.models.decoder import Decoder
from secateur.models.shrinking import FAILURES
from secateur.models.trial_copies import tiny_copy, trial_decoder, trial_tokens
from secateur.surgery.hidden.directions import Directions, times
from secateur.surgery.hidden.folding import (
    CANNOT_SLICE,
    UnfoldableError,
    reason_against,
    reason_against_one_basis,
)
from secateur.surgery.hidden.stock import StockSlicing, along, width_step
from secateur.surgery.hidden.stream_of_row import stream_of
from secateur.surgery.hidden.stream_shapes import ALLOWED, STEP, MisunderstoodError, row_with_stream

_FOUND: dict[str, Family | str] = {}
"""Rows with what was found in this process, or the reasons against it, by configuration."""


def with_stream(decoder: Decoder) -> Decoder:
    """Return the model with what reads and writes its residual stream, found by a trial where no row says it.

    Raises:
        UnfoldableError: its hidden states cannot be rotated, or no stock model can have fewer directions.
    """
    family = decoder.anatomy.family
    if family.stream is not None or reason_against(decoder) is None:
        return decoder
    reason = reason_against_one_basis(decoder)
    if reason is None:
        described = decoder.config.to_json_string(use_diff=False)
        if described not in _FOUND:
            _FOUND[described] = _tried(decoder)
        found = _FOUND[described]
        if isinstance(found, Family):
            return replace(decoder, anatomy=replace(decoder.anatomy, family=found))
        reason = found
    raise UnfoldableError(decoder.source, CANNOT_SLICE, reason)


@torch.no_grad()
def _tried(decoder: Decoder) -> Family | str:
    """Return the row with the stream, or the reason why there is none."""
    family = decoder.anatomy.family
    if decoder.has_own_code:
        return "its code comes with the checkpoint"
    try:
        with torch.random.fork_rng(devices=[]):
            tiny, _ = tiny_copy(decoder.module.config, family, decoder.module, trust_remote_code=False)
            provisional = replace(family, stream=Stream((), (), ()))
            found = row_with_stream(trial_decoder(tiny, provisional))
            _prove(trial_decoder(tiny, found))
    except MisunderstoodError as error:
        return str(error)
    except (*FAILURES, ModelError) as error:
        return f"a small copy of it cannot be sliced ({type(error).__name__}: {first_line(error)})"
    return found


def _prove(copy_of: Decoder) -> None:
    """Give a copy a stream of fewer directions, slice it to these, and compare what both compute."""
    step, dense = width_step(copy_of, STEP), copy_of.hidden_size
    assert step is not None, "the shapes were found at one"
    width = max(step, 3 * dense // 4 // step * step)
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(dense, width, generator=generator, dtype=torch.float64)).Q
    stream = stream_of(copy_of)
    for block in copy_of.block_list:
        for name, axis in stream.writers:
            if (tensor := find(block, name)) is not None:
                _project(tensor, axis, directions)
    for name in stream.tables:
        _project(find(copy_of.module, name), 1, directions)
    target = StockSlicing(copy_of, directions)
    for index, block in enumerate(copy_of.block_list):
        target.block(index, [directions] * len(reading_norms(copy_of, block)))
    sliced = target.finish(directions)
    if _differ(_logits(sliced), _logits(copy_of)):
        raise MisunderstoodError(_what_differs(copy_of))


def _logits(decoder: Decoder) -> torch.Tensor:
    found: torch.Tensor = decoder.module(input_ids=trial_tokens(decoder), use_cache=False).logits
    return found


def _differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return not torch.allclose(found, expected, rtol=0, atol=ALLOWED * float(expected.abs().max()))


def _what_differs(copy_of: Decoder) -> str:
    """Return why a rotation changes a copy: a norm whose scale cannot be moved into what reads from it, or else."""
    expected, scale = _logits(copy_of), torch.linspace(0.5, 2.0, copy_of.hidden_size)
    for name, readers in stream_of(copy_of).readers:
        moved = trial_decoder(copy.deepcopy(copy_of.module), copy_of.anatomy.family)
        for block in moved.block_list:
            norm = find(block, name)
            if norm is None:
                continue
            one_more = int(copy_of.anatomy.family.norm == "rms-plus-one")
            norm.weight.copy_((norm.weight + one_more) * scale - one_more)
            for reader, axis in readers:
                if (tensor := find(block, reader)) is not None:
                    tensor.copy_(along(tensor, axis, lambda rows: rows / scale))
        if _differ(_logits(moved), expected):
            return f"what its norm `{name}` gives is not only read by projections"
    return "a small copy of it computes something else when its hidden states are rotated"


def _project(tensor: torch.Tensor, axis: int, directions: Directions) -> None:
    """Leave of a tensor along the stream what lies in these directions."""
    tensor.copy_(along(tensor, axis, lambda rows: times(rows, directions @ directions.T)))
