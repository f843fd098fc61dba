"""Walk through a model and prune the widths of each block in turn, measured on the model as pruned so far.

Attention first, then the MLP of the same block (both at once if they run in parallel): the inputs of the output
projection are summed up, the units to remove are chosen, and the projection is refitted to do without them. For the
walk itself the dense block is run with zeros in the removed columns, which is what the pruned block computes.

Legend: P groups of U units of C inputs each (`scores/unit_scores.py`).
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
from secateur.calibration.ridge import Ridge
from secateur.calibration.statistics import device_with_float64
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, step, stored_start, through_block
from secateur.data.windows import Windows
from secateur.models.anatomy import find, holds_transposed, mlp_writers, owner_of, present
from secateur.models.decoder import Decoder
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.steps import Target, Widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.width.coupling import Kept, Part
from secateur.surgery.width.repair import choose_fit, described
from secateur.surgery.width.target import WidthAssembly

_TINY = 1e-30
_PARTS: tuple[Part, ...] = ("heads", "channels", "shared")


@dataclass(frozen=True)
class Place:
    """An output projection: that of attention, or of the MLP or one expert, of a block.

    `expert` of the expert that every token passes is the number of the others.
    """

    block: int
    part: Part
    expert: int = 0


class Choose(Protocol):
    """Decides which units remain."""

    def __call__(
        self, place: Place, weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /
    ) -> torch.Tensor:
        """Mark `keep` units of each group, (P, U) bool, given W (out, n) and the inputs of each unit (P, U, C)."""


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
    found = find(decoder.block_list[index], writer_of(decoder, index, part))
    if isinstance(found, nn.Parameter):
        block, name = decoder.block_list[index], writer_of(decoder, index, part)
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


def parts_to_measure(keep: Widths, dense: BlockWidths) -> list[Part]:
    """Return the parts of a block of which some units go and others stay."""
    left = {"heads": keep.groups * keep.queries, "channels": keep.channels}
    there = {"heads": dense.heads, "channels": dense.channels}
    left["shared"], there["shared"] = (dense.shared * one["channels"] for one in (left, there))
    return [part for part in _PARTS if 0 < left[part] < there[part]]


def _lost(keep: Widths, dense: BlockWidths) -> list[Part]:
    """Return the branches of a block that go."""
    gone: dict[Part, bool] = {"heads": dense.heads > keep.groups == 0, "channels": dense.channels > keep.channels == 0}
    return [part for part in gone if gone[part]]


def silenced(decoder: Decoder, index: int, part: Part) -> dict[str, torch.Tensor]:
    """Return parameters of block `index`, whose weights are loaded, with which one of its branches writes nothing."""
    block, family = decoder.block_list[index], decoder.anatomy.family
    if part != "heads":
        return {name: torch.zeros_like(tensor) for name, tensor, _ in mlp_writers(block, family)}
    name = writer_of(decoder, index, part)
    named = find(block, name).named_parameters(prefix=name)
    return {path: torch.zeros_like(parameter) for path, parameter in named}


@dataclass(frozen=True)
class Refit:
    """How output projections are refitted to the remaining inputs.

    Attributes:
        repair: by least squares, where that is better on held-out windows; else the removed columns are left out.
        ridge: of that fit; "auto" is chosen on held-out windows.
        bias: put what a constant can compensate for into biases, where the result has them.
        target: what an MLP is to write: what brings the states back to those of the dense model, where it writes them
            directly; or what it wrote before, which is what all others do, and all with a bias.
        others: blocks whose MLP is refitted to the dense states even if nothing is removed from it, once something was
            removed before it.
    """

    repair: bool = True
    ridge: Ridge = "auto"
    bias: bool = False
    target: Target = "block"
    others: frozenset[int] = frozenset()


REFIT = Refit()


@dataclass(frozen=True)
class Pruned:
    """A model with fewer units in its blocks.

    Attributes:
        decoder: the model.
        fits: for each part of a block that was fitted, the ridge and the errors on held-out windows.
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
    """Prune the widths of every block.

    Args:
        decoder: the model; it stays as it is.
        windows: calibration windows.
        widths: what each block keeps.
        choose: decides which units remain.
        stock: keep the architecture, or write the modelling file.
        refit: how output projections are refitted to the remaining inputs.
        gram: accumulate the products of inputs, which repair and some choices read.
        options: batch size and progress.

    Raises:
        ModelError: the widths of this family cannot be pruned, or not like this.
        NumericsError: NaN or infinity on the way.
    """
    target = WidthAssembly(decoder, widths, stock=stock, bias=refit.bias)
    folds = folds_of(windows) if gram else None
    fits: list[dict[str, Any]] = []
    dense = [block_widths(decoder, index) for index in range(decoder.block_count)]
    reads = refit.repair or any(parts_to_measure(*pair) for pair in zip(widths, dense, strict=True))
    changed = False
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size) if reads else []
        if refit.repair and refit.target == "dense" and not refit.bias and writes_stream(decoder):
            for batch in batches:
                store.put(of_dense(batch), store.get(batch.index))
        for index in options.progress(range(decoder.block_count), "pruning widths block by block", decoder.block_count):
            with decoder.block(index):
                walk = _Block(decoder, index, widths[index], batches, store, target, refit, folds)
                changed |= walk.is_cut
                walk.prune(choose, mend=changed and index in refit.others)
                fits += walk.fits
    return Pruned(target.finish(), fits)


@dataclass
class _Block:
    """One block to be pruned, its weights loaded."""

    decoder: Decoder
    index: int
    keep: Widths
    batches: list[Batch]
    store: StateStore
    target: WidthAssembly
    refit: Refit
    folds: Folds | None
    fits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_cut(self) -> bool:
        """Whether anything is removed from it."""
        dense = block_widths(self.decoder, self.index)
        return bool(parts_to_measure(self.keep, dense) or _lost(self.keep, dense))

    def prune(self, choose: Choose, *, mend: bool) -> None:
        """Choose, refit, run the batches through, and add the block to the result; `mend` refits a whole MLP too."""
        dense = block_widths(self.decoder, self.index)
        kept = Kept.all_of(dense)
        smaller = parts_to_measure(self.keep, dense)
        follows_dense = any(of_dense(batch) in self.store for batch in self.batches)
        if mend and follows_dense and self.keep.channels == dense.channels > 0:
            smaller.append("channels")
        stages = [smaller] if self.decoder.anatomy.parallel and smaller else _stages(smaller)
        edits: dict[str, torch.Tensor] = {}
        for part in _lost(self.keep, dense):
            edits |= silenced(self.decoder, self.index, part)
            (kept.heads if part == "heads" else kept.channels)[:] = False
        for batch in self.batches:
            if of_dense(batch) in self.store:
                dense_state = step(self.decoder, self.index, batch, self.store.get(of_dense(batch)))
                self.store.put(of_dense(batch), dense_state)
        for parts in stages:
            with holding(self.block, edits):
                measured = measure_inputs(self.decoder, self.index, parts, self.batches, self.store, self.folds)
            for part, sums in measured.items():
                edits |= self._edit(part, sums, choose, kept, dense)
        with holding(self.block, edits):
            through_block(self.decoder, self.index, self.batches, self.store)
            self.target.block(self.index, kept)

    @property
    def block(self) -> nn.Module:
        return self.decoder.block_list[self.index]

    def _edit(
        self, part: Part, sums: list[InputSums], choose: Choose, kept: Kept, dense: BlockWidths
    ) -> dict[str, torch.Tensor]:
        """Choose what remains of one part, note it in `kept`, and return the output projection as it is then."""
        bias = self.refit.bias and self.target.writes_bias(self.index, part)
        units, keep = units_of(part, dense, self.keep)
        written, shifts, fits = [], [], []
        weights = writer_weights(self.decoder, self.index, part)
        for expert, (weight, one) in enumerate(zip(weights, sums, strict=True)):
            weight, units = weight.to(one.total.device), units.to(one.total.device)
            place = Place(self.index, part, max(1, dense.experts) if part == "shared" else expert)
            chosen = (
                torch.ones(units.shape[:2], dtype=torch.bool, device=weight.device)
                if keep == units.shape[1]
                else choose(place, weight, one, units, keep)
            )
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
        """Return weights (out, n) under the block's names, rounded to the dtype they will be saved in."""
        name = writer_of(self.decoder, self.index, part)
        found = find(self.block, name)
        if isinstance(found, nn.Parameter):
            return {name: self._rounded(stacked_weights(self.block, name, weights), found)}
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


def _stages(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts in the order in which they are pruned: attention, then all that the MLP consists of."""
    first: list[Part] = [part for part in parts if part == "heads"]
    then: list[Part] = [part for part in parts if part != "heads"]
    return [one for one in (first, then) if one]


def _note(kept: Kept, part: Part, expert: int, chosen: torch.Tensor, dense: BlockWidths, keep: Widths) -> None:
    """Mark the removed units; `chosen` is (1, channels), (S, channels), (1, groups) or (groups, queries)."""
    if part == "shared":
        kept.channels[-dense.shared :] = chosen
    elif part == "channels":
        kept.channels[expert] = chosen[0]
    elif keep.queries == dense.queries:
        kept.heads[:] = torch.cat([chosen[0].repeat_interleave(dense.queries), chosen[0]])
    else:
        kept.heads[: dense.heads] = chosen.flatten()


def units_of(part: Part, dense: BlockWidths, keep: Widths) -> tuple[torch.Tensor, int]:
    """Return the inputs of each unit that may be removed, (P, U, C), and how many units of each group remain.

    Channels are one group (those of a shared expert as many as it is times wider than the others), and so are key/value
    heads; of query heads as many go in each key/value head's group.
    """
    if part == "channels":
        return torch.arange(dense.channels)[None, :, None], keep.channels
    if part == "shared":
        return torch.arange(dense.shared * dense.channels).view(dense.shared, -1, 1), keep.channels
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
    *,
    advance: bool = False,
) -> dict[Part, list[InputSums]]:
    """Run block `index`, its weights loaded, on the states in the store, and sum up the inputs of output projections.

    With `advance` the states it makes take the place of those in the store.

    With `folds` also what a fit reads, including what the output of a dense MLP lacks if the store has the states that
    leave the block of the dense model: a token has weight 1 / ‖h‖² there, h being the residual stream that leaves the
    block, by whose length the next norm divides; else the few tokens with massive activations (Sun et al. 2024,
    "Massive Activations in Large Language Models") outweigh all others.
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
        if advance:
            store.put(batch.index, hidden)
        own = None if folds is None else folds.slice(first, len(batch.tokens))
        lacking = None
        if own is not None and of_dense(batch) in store:
            lacking = (store.get(of_dense(batch)) - hidden) / residual_multiplier(decoder)
        for part, found in captured.items():
            for inputs in found:
                wanted = lacking if part == "channels" and len(sums[part]) == 1 else None
                _add(sums[part][inputs.expert], inputs, hidden, own, wanted)
        first += len(batch.tokens)
    for part, into in sums.items():
        for one in into:
            one.require_finite(f"what enters {writer_of(decoder, index, part)} of block {index}")
    return sums


def of_dense(batch: Batch) -> tuple[int, str]:
    """Return the key of the states of the dense model."""
    return batch.index, "dense"


def writes_stream(decoder: Decoder) -> bool:
    """Return whether what an MLP's output projection writes enters the residual stream without a norm."""
    return decoder.anatomy.family.order == "pre" and getattr(decoder.config, "do_layer_norm_before", True) is not False


def residual_multiplier(decoder: Decoder) -> float:
    """Return the factor of what a branch writes to the residual stream."""
    return float(getattr(decoder.config, decoder.anatomy.family.residual_multiplier or "", 1.0))


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
