"""The inputs of the output projections of a block: summed up over windows, and the projections that read them.

Legend: W (out, n) an output projection of n inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.folds import Folds
from secateur.calibration.inputs import Captured, InputSums, capturing_inputs
from secateur.calibration.statistics import device_with_float64
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, step
from secateur.models.anatomy import find, holds_transposed, mlp_writers, owner_of, present, residual_factor
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.surgery.width.coupling import Part

_TINY = 1e-30


@dataclass(frozen=True)
class Goal:
    """States that an output projection is to reach.

    Attributes:
        part: whose.
        key: returns the key of these states in the store.
    """

    part: Part
    key: Callable[[Batch], tuple[int, str]]


def writer_of(decoder: Decoder, index: int, part: Part) -> str:
    """Return the name of the output projection of attention or the MLP of a block."""
    family = decoder.anatomy.family
    names = {"heads": family.attention_out, "channels": family.mlp_out, "shared": family.shared_out}[part]
    return next(present(decoder.block_list[index], names))[0]


def new_sums(decoder: Decoder, index: int, part: Part, *, gram: bool) -> list[InputSums]:
    """Create empty sums for an output projection of a block: one, or one for each expert."""
    widths = block_widths(decoder, index)
    if part == "heads":
        return [InputSums(widths.heads * widths.head_size, decoder.device, unit=widths.head_size, gram=gram)]
    if part == "shared":
        return [InputSums(widths.shared * widths.channels, decoder.device, gram=gram)]
    return [InputSums(widths.channels, decoder.device, gram=gram) for _ in range(max(1, widths.experts))]


def writer_weights(decoder: Decoder, index: int, part: Part) -> list[torch.Tensor]:
    """Return W (out, n), float64, of an output projection, for each expert; its weights must be loaded."""
    block, name = decoder.block_list[index], writer_of(decoder, index, part)
    found = find(block, name)
    if isinstance(found, nn.Parameter):
        return [expert_weight(block, name, expert) for expert in range(len(found))]
    tensor = found.weight.detach()
    weight = tensor.to(device_with_float64(tensor.device)).double()
    return [weight.T if isinstance(found, Conv1D) else weight]


def expert_weight(block: nn.Module, name: str, expert: int) -> torch.Tensor:
    """Return W (out, n), float64, of one of the stacked experts whose output projections have this name."""
    tensor = find(block, name)[expert].detach()
    weight = tensor.to(device_with_float64(tensor.device)).double()
    return weight.T if holds_transposed(owner_of(block, name)) else weight


def stacked_weights(block: nn.Module, name: str, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return weights (out, n) of all experts as a block holds them under this name."""
    stacked = torch.stack(tuple(weights))
    return stacked.transpose(1, 2) if holds_transposed(owner_of(block, name)) else stacked


def silenced(decoder: Decoder, index: int, part: Part) -> dict[str, torch.Tensor]:
    """Return parameters of block `index`, whose weights are loaded, with which one of its branches writes nothing."""
    block, family = decoder.block_list[index], decoder.anatomy.family
    if part != "heads":
        return {name: torch.zeros_like(tensor) for name, tensor, _ in mlp_writers(block, family)}
    name = writer_of(decoder, index, part)
    named = find(block, name).named_parameters(prefix=name)
    return {path: torch.zeros_like(parameter) for path, parameter in named}


@torch.no_grad()
def measure_inputs(
    decoder: Decoder,
    index: int,
    parts: Sequence[Part],
    batches: Sequence[Batch],
    store: StateStore,
    folds: Folds | None = None,
    *,
    advance: bool = False,
    run: Callable[[Batch], torch.Tensor] | None = None,
    goal: Goal | None = None,
) -> dict[Part, list[InputSums]]:
    """Run block `index`, its weights loaded, on the states in the store, and sum up the inputs of output projections.

    With `advance` the states it makes take the place of those in the store. `run` is another way to run it on a batch;
    it may stop after attention.

    With `folds` also what a fit reads, including what the output of one part lacks to reach a goal: by default that of
    a dense MLP to reach the states that leave the block of the dense model, if the store has them. A token has weight
    1 / ‖h‖² there, h being the residual stream where the run ends, by whose length the next norm divides; else the few
    tokens with massive activations (Sun et al. 2024, "Massive Activations in Large Language Models") outweigh all
    others.
    """
    block = decoder.block_list[index]
    sums = {part: new_sums(decoder, index, part, gram=folds is not None) for part in parts}
    goal, first = goal or Goal("channels", of_dense), 0
    for batch in batches:
        with ExitStack() as hooks:
            captured = {
                part: hooks.enter_context(capturing_inputs(block, writer_of(decoder, index, part), batch, len(into)))
                for part, into in sums.items()
            }
            hidden = step(decoder, index, batch, store.get(batch.index)) if run is None else run(batch)
        if advance:
            store.put(batch.index, hidden)
        own = None if folds is None else folds.slice(first, len(batch.tokens))
        lacking = None
        if own is not None and goal.key(batch) in store:
            lacking = (store.get(goal.key(batch)) - hidden) / residual_factor(decoder.config, decoder.anatomy.family)
        for part, found in captured.items():
            for inputs in found:
                wanted = lacking if part == goal.part and len(sums[part]) == 1 else None
                _add(sums[part][inputs.expert], inputs, hidden, own, wanted)
        first += len(batch.tokens)
    for part, into in sums.items():
        for one in into:
            one.require_finite(f"what enters {writer_of(decoder, index, part)} of block {index}")
    return sums


def as_saved(decoder: Decoder, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a parameter in the place of another, rounded to the dtype it will be saved in."""
    return tensor.to(decoder.saved_dtype).to(like).contiguous()


def of_dense(batch: Batch) -> tuple[int, str]:
    """Return the key of the states of the dense model."""
    return batch.index, "dense"


def writes_stream(decoder: Decoder) -> bool:
    """Return whether what an MLP's output projection writes enters the residual stream without a norm."""
    return decoder.anatomy.family.order == "pre" and getattr(decoder.config, "do_layer_norm_before", True) is not False


def _add(
    sums: InputSums, captured: Captured, hidden: torch.Tensor, folds: Folds | None, lacking: torch.Tensor | None = None
) -> None:
    """Add the inputs captured in a batch, which came from states (windows, positions, d) that lack something."""
    window = captured.rows // hidden.shape[1]
    if folds is None:
        sums.update(captured.inputs, window)
        return
    states = hidden.flatten(0, 1)[captured.rows.to(hidden.device)].to(sums.total.device).double()
    length = states.square().mean(dim=1).clamp_min(_TINY)
    weight = folds.weight.to(length.device)[window.to(length.device)] / length
    missed = None if lacking is None else lacking.flatten(0, 1)[captured.rows.to(lacking.device)]
    sums.update(captured.inputs, window, weight, folds.held_out[window], missed)


@contextmanager
def holding(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give a block other parameters for a while, including a bias where it has none."""
    before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            holder = block.get_submodule(owner)
            before.append((holder, leaf, holder._parameters[leaf]))
            holder._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for holder, leaf, parameter in before:
            holder._parameters[leaf] = parameter
