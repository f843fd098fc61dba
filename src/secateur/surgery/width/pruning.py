"""Walk through a model block by block and narrow each as its turn comes, measured on what is cut already.

Attention first, then the MLP of the same block (both at once where they stand side by side): what enters the
projection that writes is summed up, the units that go are chosen, and the projection is fitted to do without them. For
the walk itself the dense block is run with zeros in the columns that went, which is what the narrower block computes.

Legend: P pens of U units of C inputs each (`scores/units.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.folds import Folds, folds_of
from secateur.calibration.inputs import Captured, InputSums, capturing_inputs
from secateur.calibration.statistics import device_with_float64
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, step, stored_start, through_block
from secateur.data.windows import Windows
from secateur.models.anatomy import find, present
from secateur.models.decoder import Decoder
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.steps import Widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.width.coupling import Kept, Part
from secateur.surgery.width.repair import Ridge, choose_fit, described
from secateur.surgery.width.target import WidthAssembly

_TINY = 1e-30


@dataclass(frozen=True)
class Place:
    """A projection that writes: that of attention, or of the MLP or one expert, of a block."""

    block: int
    part: Part
    expert: int = 0


class Choose(Protocol):
    """Says which units stay."""

    def __call__(
        self, place: Place, weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /
    ) -> torch.Tensor:
        """Mark `keep` units of each pen, (P, U) bool, given W (out, n) and the inputs of each unit (P, U, C)."""


def writer_of(decoder: Decoder, index: int, part: Part) -> str:
    """Name the projection by which attention or the MLP of a block writes."""
    family = decoder.anatomy.family
    names = family.attention_out if part == "heads" else family.mlp_out
    return next(present(decoder.block_list[index], names))[0]


def new_sums(decoder: Decoder, index: int, part: Part, *, gram: bool) -> list[InputSums]:
    """Start the sums of a block's projection that writes: one, or one for each expert."""
    widths = block_widths(decoder, index)
    if part == "heads":
        return [InputSums(widths.heads * widths.head_size, decoder.device, unit=widths.head_size, gram=gram)]
    return [InputSums(widths.channels, decoder.device, gram=gram) for _ in range(max(1, widths.experts))]


def writer_weights(decoder: Decoder, index: int, part: Part) -> list[torch.Tensor]:
    """Return W (out, n), float64, of a block's projection that writes, for each expert; its weights must be present."""
    found = find(decoder.block_list[index], writer_of(decoder, index, part))
    tensor = (found if isinstance(found, nn.Parameter) else found.weight).detach()
    weight = tensor.to(device_with_float64(tensor.device)).double()
    if isinstance(found, nn.Parameter):
        return list(weight)
    return [weight.T if isinstance(found, Conv1D) else weight]


@dataclass(frozen=True)
class Refit:
    """How the projections that write are fitted to the inputs that are left.

    Attributes:
        repair: by least squares, where that serves windows held out of the fit; else their columns are left out.
        ridge: of that fit; "auto" is chosen on windows held out.
        bias: put what a constant can make up for into biases, where the result has them.
    """

    repair: bool = True
    ridge: Ridge = "auto"
    bias: bool = False


REFIT = Refit()


@dataclass(frozen=True)
class Pruned:
    """A model with fewer units in its blocks.

    Attributes:
        decoder: the model.
        fits: for each part of a block that was fitted, the ridge and the errors on windows held out.
    """

    decoder: Decoder
    fits: list[dict[str, Any]]


@torch.no_grad()
def prune_width(
    decoder: Decoder,
    windows: Windows,
    widths: Sequence[Widths],
    choose: Choose,
    *,
    stock: bool,
    refit: Refit = REFIT,
    gram: bool = True,
    options: RunOptions = DEFAULTS,
) -> Pruned:
    """Narrow every block.

    Args:
        decoder: the model; it stays as it is.
        windows: calibration windows.
        widths: what each block keeps.
        choose: says which units stay.
        stock: keep the architecture, or write the modelling file.
        refit: how the projections that write are fitted to what is left.
        gram: gather the products of inputs, which repair and some choices read.
        options: batch size and progress.

    Raises:
        ModelError: the family cannot be narrowed, or not like this.
        NumericsError: NaN or infinity on the way.
    """
    target = WidthAssembly(decoder, widths, stock=stock, bias=refit.bias)
    folds = folds_of(windows) if gram else None
    fits: list[dict[str, Any]] = []
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        for index in options.progress(range(decoder.block_count), "narrowing block by block", decoder.block_count):
            with decoder.block(index):
                walk = _Block(decoder, index, widths[index], batches, store, target, refit, folds)
                walk.narrow(choose)
                fits += walk.fits
    return Pruned(target.finish(), fits)


@dataclass
class _Block:
    """One block on its way to be narrowed, its weights present."""

    decoder: Decoder
    index: int
    keep: Widths
    batches: list[Batch]
    store: StateStore
    target: WidthAssembly
    refit: Refit
    folds: Folds | None
    fits: list[dict[str, Any]] = field(default_factory=list)

    def narrow(self, choose: Choose) -> None:
        """Choose, refit, take the batches through, and hand the block over."""
        dense = block_widths(self.decoder, self.index)
        kept = Kept.all_of(dense)
        smaller: list[Part] = []
        if self.keep.groups * self.keep.queries < dense.heads:
            smaller.append("heads")
        if self.keep.channels < dense.channels:
            smaller.append("channels")
        stages = [smaller] if self.decoder.anatomy.parallel and smaller else [[part] for part in smaller]
        edits: dict[str, torch.Tensor] = {}
        for parts in stages:
            with _holding(self.block, edits):
                measured = measure_inputs(self.decoder, self.index, parts, self.batches, self.store, self.folds)
            for part, sums in measured.items():
                edits |= self._edit(part, sums, choose, kept, dense)
        with _holding(self.block, edits):
            through_block(self.decoder, self.index, self.batches, self.store)
            self.target.block(self.index, kept)

    @property
    def block(self) -> nn.Module:
        return self.decoder.block_list[self.index]

    def _edit(
        self, part: Part, sums: list[InputSums], choose: Choose, kept: Kept, dense: BlockWidths
    ) -> dict[str, torch.Tensor]:
        """Choose what stays of one part, note it in `kept`, and give the projection that writes as it is then."""
        bias = self.refit.bias and self.target.writes_bias(self.index, part)
        units, keep = units_of(part, dense, self.keep)
        written, shifts, fits = [], [], []
        weights = writer_weights(self.decoder, self.index, part)
        for expert, (weight, one) in enumerate(zip(weights, sums, strict=True)):
            weight, units = weight.to(one.total.device), units.to(one.total.device)
            chosen = choose(Place(self.index, part, expert), weight, one, units, keep)
            stay = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
            stay[units[chosen].flatten()] = True
            _note(kept, part, expert, chosen.cpu(), dense, self.keep)
            fits.append(choose_fit(weight, one, stay, repair=self.refit.repair, bias=bias, ridge=self.refit.ridge))
            weight, shift = fits[-1].applied(weight, one, stay)
            written.append(weight)
            shifts.append(shift)
        if self.refit.repair:
            self.fits.append({"block": self.index, "part": part, **described(fits)})
        return self._parameters(part, written, shifts[0])

    def _parameters(
        self, part: Part, weights: list[torch.Tensor], shift: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Name weights (out, n) as the block does, rounded to the dtype they will be saved in."""
        name = writer_of(self.decoder, self.index, part)
        found = find(self.block, name)
        if isinstance(found, nn.Parameter):
            return {name: self._rounded(torch.stack(weights), found)}
        edits = {
            f"{name}.weight": self._rounded(weights[0].T if isinstance(found, Conv1D) else weights[0], found.weight)
        }
        if shift is not None:
            edits[f"{name}.bias"] = self._rounded(
                shift if found.bias is None else found.bias.to(shift) + shift, found.weight
            )
        return edits

    def _rounded(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.decoder.saved_dtype).to(like).contiguous()


def _note(kept: Kept, part: Part, expert: int, chosen: torch.Tensor, dense: BlockWidths, keep: Widths) -> None:
    """Mark the units that go; `chosen` is (1, channels), (1, groups) or (groups, queries)."""
    if part == "channels":
        kept.channels[expert] = chosen[0]
    elif keep.queries == dense.queries:
        kept.heads[:] = torch.cat([chosen[0].repeat_interleave(dense.queries), chosen[0]])
    else:
        kept.heads[: dense.heads] = chosen.flatten()


def units_of(part: Part, dense: BlockWidths, keep: Widths) -> tuple[torch.Tensor, int]:
    """Return the inputs of each unit that may go, (P, U, C), and how many units of each pen stay.

    Channels and key/value groups are one pen; query heads have a pen for each group, as many go in each.
    """
    if part == "channels":
        return torch.arange(dense.channels)[None, :, None], keep.channels
    inputs = torch.arange(dense.heads * dense.head_size)
    if keep.queries == dense.queries:
        return inputs.view(1, dense.groups, -1), keep.groups
    return inputs.view(dense.groups, dense.queries, dense.head_size), keep.queries


@torch.no_grad()
def measure_inputs(
    decoder: Decoder,
    index: int,
    parts: Sequence[Part],
    batches: Sequence[Batch],
    store: StateStore,
    folds: Folds | None = None,
) -> dict[Part, list[InputSums]]:
    """Run block `index`, its weights present, on the states in the store, and sum up what enters what writes.

    With `folds` also what a fit reads: a token weighs 1 / ‖h‖² there, h the residual stream that leaves the block, by
    whose length the next norm divides; else the few tokens with massive activations (Sun et al. 2024, "Massive
    Activations in Large Language Models") outweigh all others.
    """
    block = decoder.block_list[index]
    sums = {part: new_sums(decoder, index, part, gram=folds is not None) for part in parts}
    first = 0
    for batch in batches:
        with ExitStack() as hooks:
            captured = {
                part: hooks.enter_context(capturing_inputs(block, writer_of(decoder, index, part), batch, len(into)))
                for part, into in sums.items()
            }
            hidden = step(decoder, index, batch, store.get(batch.index))
        own = None if folds is None else folds.slice(first, len(batch.tokens))
        for part, found in captured.items():
            for inputs in found:
                _add(sums[part][inputs.expert], inputs, hidden, own)
        first += len(batch.tokens)
    for part, into in sums.items():
        for one in into:
            one.require_finite(f"what enters {writer_of(decoder, index, part)} of block {index}")
    return sums


def _add(sums: InputSums, captured: Captured, hidden: torch.Tensor, folds: Folds | None) -> None:
    """Add what was captured in a batch, from which the states `hidden` (windows, positions, d) came."""
    window = captured.rows // hidden.shape[1]
    if folds is None:
        sums.update(captured.inputs, window)
        return
    states = hidden.flatten(0, 1)[captured.rows.to(hidden.device)].to(sums.total.device).double()
    length = states.square().mean(dim=1).clamp_min(_TINY)
    weight = folds.weight.to(length.device)[window.to(length.device)] / length
    sums.update(captured.inputs, window, weight, folds.held_out[window])


@contextmanager
def _holding(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let a block have other parameters for a while, also a bias where it has none."""
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
