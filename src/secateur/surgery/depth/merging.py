"""Merge the weights of adjacent blocks into one block.

Sliding-Window Merging: Ding et al. 2025, "A Sliding Layer Merging Method for Efficient Depth-Wise Pruning in LLMs"
(arXiv:2502.19159).

Every rule is a linear combination over the blocks of the window, with one coefficient per block, and separate
coefficients for norms. For blocks 0 … n−1 of the window, lowest first:

* `delta-sum`, the paper's equation: θ* = θ_0 + Σ_{k≥1} (θ_k − θ_0) = Σ_{k≥1} θ_k − (n−2)·θ_0;
* `top`, what the released code computes: it adds each difference to the already updated weight, which telescopes to the
  linear layers of the highest block, with the norms of the lowest;
* `highest`: the highest block with its own norms, without which its linear layers read other inputs than they were
  trained on; of two blocks, what the paper's equation makes;
* `mean`: 1/n each;
* `weighted`: block influence, BI_k / Σ BI, uniform where that sum is 0.

Experts are merged individually, each with those of the same index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.errors import InputError
from secateur.models.decoder import Decoder
from secateur.models.depth import block_kind
from secateur.plan.steps import Rule, Span
from secateur.surgery.depth.blocks import keep_blocks, query_scaled_by_number, with_block_tensors


@dataclass(frozen=True)
class Shares:
    """Coefficients of the blocks of a window in the merged block, lowest block first.

    Attributes:
        linears: coefficients of all weights and biases except those of norms.
        norms: coefficients of the weights and biases of norms.
    """

    linears: tuple[float, ...]
    norms: tuple[float, ...]


def delta_sum(size: int) -> Shares:
    """Add each block's difference from the lowest block to the lowest block."""
    shares = (2.0 - size, *[1.0] * (size - 1))
    return Shares(shares, shares)


def top(size: int) -> Shares:
    """Use the linear layers of the highest block and the norms of the lowest."""
    others = [0.0] * (size - 1)
    return Shares((*others, 1.0), (1.0, *others))


def highest(size: int) -> Shares:
    """Use the highest block as it is."""
    shares = (*[0.0] * (size - 1), 1.0)
    return Shares(shares, shares)


def mean(size: int) -> Shares:
    """Average the blocks."""
    shares = (1.0 / size,) * size
    return Shares(shares, shares)


def weighted(influence: Sequence[float]) -> Shares:
    """Weight the blocks by their influence; uniformly if the sum of influences is 0."""
    total = sum(influence)
    if total == 0:
        return mean(len(influence))
    shares = tuple(value / total for value in influence)
    return Shares(shares, shares)


def shares_for(rule: Rule, window: Span, influence: Sequence[float] = ()) -> Shares:
    """Return the coefficients of a window's blocks; `influence`, for `weighted`, has one value per block."""
    low, high = window
    if rule == "weighted":
        return weighted(influence[low : high + 1])
    return {"highest": highest, "delta-sum": delta_sum, "top": top, "mean": mean}[rule](high + 1 - low)


def alike(decoder: Decoder, index: int, *, across_types: bool) -> bool:
    """Return whether a block can be merged with the next: same shapes and, unless `across_types`, same layer type."""
    left, right = decoder.block_list[index], decoder.block_list[index + 1]
    return _shapes(left) == _shapes(right) and (across_types or _kind(decoder, index) == _kind(decoder, index + 1))


@torch.no_grad()
def merged_tensors(decoder: Decoder, window: Span, shares: Shares, place: int | None = None) -> dict[str, torch.Tensor]:
    """Combine the blocks of a window; a skeleton reads them one after the other.

    Args:
        decoder: the model.
        window: lowest and highest block.
        shares: coefficients of the blocks.
        place: number of the block as which the result will run; None is the lowest.

    Returns:
        All parameters of the merged block by name, in the model's dtype, rounded to the one they will be saved in.
    """
    low, high = window
    home = decoder.device if decoder.is_skeleton else next(decoder.block_list[low].parameters()).device
    total: dict[str, torch.Tensor] = {}
    for index, of_linears, of_norms in zip(range(low, high + 1), shares.linears, shares.norms, strict=True):
        if of_linears == of_norms == 0:
            continue
        with decoder.block(index) as block:
            for name, tensor, is_norm in _tensors(decoder, block, index, low if place is None else place):
                share = of_norms if is_norm else of_linears
                if share != 0:
                    part = tensor.to(home, torch.promote_types(tensor.dtype, torch.float32))
                    total[name] = _plus(total.get(name), part, share)
    return {name: tensor.to(decoder.saved_dtype).to(decoder.module.dtype) for name, tensor in total.items()}


def merge_windows(
    decoder: Decoder,
    windows: Sequence[Span],
    rule: Rule,
    influence: Sequence[float] = (),
    *,
    across_types: bool = False,
) -> Decoder:
    """Return a decoder with one block in place of each window; the given one is unchanged.

    Args:
        decoder: the model.
        windows: lowest and highest block of each window; they do not overlap.
        rule: how weights are combined.
        influence: block influence of every block, for `weighted`.
        across_types: whether blocks of different layer types may be merged.

    Raises:
        InputError: blocks of a window differ in shape or, unless that is allowed, in layer type.
        ModelError: the model is a skeleton of an architecture that scales weights by block number.
    """
    if not windows:
        return decoder
    for low, high in windows:
        for index in range(low, high):
            if not alike(decoder, index, across_types=across_types):
                raise InputError(
                    f"blocks {index} and {index + 1} cannot become one: "
                    + _difference(decoder, index, across_types=across_types)
                )
    absorbed = {block for low, high in windows for block in range(low + 1, high + 1)}
    kept = [block for block in range(decoder.block_count) if block not in absorbed]
    shorter = keep_blocks(decoder, kept)
    ordered = sorted(windows)
    edits = (
        (
            kept.index(low),
            merged_tensors(decoder, (low, high), shares_for(rule, (low, high), influence), kept.index(low)),
        )
        for low, high in ordered
    )
    shares = [[shares_for(rule, window, influence).linears, rule] for window in ordered]
    return with_block_tensors(shorter, edits, {"merge": ordered, "shares": shares})


def _difference(decoder: Decoder, index: int, *, across_types: bool) -> str:
    if alike(decoder, index, across_types=True) and not across_types:
        kinds = [", ".join(map(str, _kind(decoder, one))) for one in (index, index + 1)]
        return f"they differ in layer type ({kinds[0]}; {kinds[1]}); across_types=true allows it."
    return "their weights differ in shape."


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in block.named_parameters()}


def _kind(decoder: Decoder, index: int) -> tuple[object, ...]:
    return block_kind(decoder.config, decoder.anatomy.family, index)


def _plus(total: torch.Tensor | None, part: torch.Tensor, share: float) -> torch.Tensor:
    """Add a multiple of a tensor; a lone tensor with coefficient 1 is returned uncopied."""
    if total is None:
        return part if share == 1 else part * share
    return torch.add(total, part, alpha=share)


def _tensors(decoder: Decoder, block: nn.Module, index: int, place: int) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield name, tensor and whether it belongs to a norm, adapted to the block's new position."""
    scaled = query_scaled_by_number(decoder)
    for owner, holder in block.named_modules():
        for leaf, parameter in holder.named_parameters(recurse=False):
            tensor = parameter.detach()
            if owner == scaled and place != index:
                tensor = tensor.clone()
                tensor[..., : tensor.shape[-1] // 3] *= (place + 1) / (index + 1)
            yield f"{owner}.{leaf}" if owner else leaf, tensor, "norm" in type(holder).__name__.lower()
