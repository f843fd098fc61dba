"""Width pruning: methods that remove heads, key/value groups and channels of the MLP.

* FLAP: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (AAAI). Each block
  finds its own width, so the result needs its modelling file.
* Wanda-sp: the same paper's structured version of Wanda (Sun et al. 2024).
* LLM-Pruner: Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models" (NeurIPS).
* Minitron: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (NeurIPS), its
  width part without the training that follows there.
* obs-width is secateur's own: greedy choice by the cost of a unit's absence after repair.

Departures from the papers, for all of them: blocks are pruned one after the other, each measured on the model as pruned
so far (LLM-Pruner's gradients are those of the dense model), and output projections are refitted in closed form
(`repair`). Heads are removed last: where a group of heads goes instead of as many parameters of the MLPs, the bundled
model loses far more (docs/methods.md); `heads=even` is what the papers do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch

from secateur.calibration.inputs import InputSums
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, SecateurWarning
from secateur.methods import slice_hidden
from secateur.methods.allocation.database import open_database
from secateur.methods.allocation.widths import Allocation
from secateur.methods.budget import Budget
from secateur.methods.global_threshold import Thresholds, fluctuation_profiles
from secateur.methods.method import Applied, Measurements, applies, method
from secateur.methods.slice_hidden import rounded_width
from secateur.methods.uniform_widths import (
    Candidates,
    EvenSettings,
    FlapSettings,
    MinitronSettings,
    PrunerSettings,
    SurgeonSettings,
    rounding_for,
)
from secateur.models.decoder import Decoder
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.hidden import SliceHidden, slicing_forwards
from secateur.plan.steps import AnyStep, Choice, PruneWidth
from secateur.plan.width import width_forwards
from secateur.scores.taylor import taylor_by_unit
from secateur.scores.unit_scores import (
    activation_norm,
    best_units,
    cheapest_to_lose,
    fluctuation,
    magnitude,
    weighted_norm,
)
from secateur.surgery.depth.blocks import keep_blocks
from secateur.surgery.hidden.stock import stock_stream_sizes, width_step
from secateur.surgery.width.pruning import Choose, Place, Refit, prune_width
from secateur.surgery.width.target import (
    blocks_without_bias,
    dense_widths,
    names_every_block,
    reason_against_heads,
    require_width_prunable,
    width_sizes,
)

_TOKENS_PER_INPUT = 16
"""With fewer calibration tokens than this per input of a projection, its repair generalises badly to other texts."""
_OBS_BATCHES = 128
"""How often costs are recomputed while all units of a projection would be removed."""


def decide_evenly(name: str, choose: Choice) -> Callable[[Measurements, EvenSettings, Budget], Sequence[PruneWidth]]:
    """Create the function that keeps the same widths in all free blocks."""

    def decide(measurements: Measurements, settings: EvenSettings, budget: Budget) -> Sequence[PruneWidth]:
        if budget.is_zero:
            return ()
        decoder = measurements.decoder
        require_width_prunable(decoder)
        free = settings.free_blocks(decoder.block_count)
        candidates = Candidates(decoder, free, settings.heads, settings.rounding)
        unrounded = None
        if budget.aim == "own":
            widths = candidates.given(settings.ffn, settings.groups, settings.queries)
        elif budget.aim == "ratio":
            widths = candidates.ratio(budget.value)
        else:
            widths, unrounded = candidates.meet(budget)
        if widths == dense_widths(decoder):
            return ()
        return (
            PruneWidth(
                method=name,
                settings=settings.model_dump(exclude_none=True),
                widths=widths,
                choose=choose,
                stock=candidates.stock,
                repair=settings.repair,
                ridge=settings.ridge,
                target=settings.target,
                rounding=1 if budget.aim == "own" else candidates.multiple,
                unrounded=unrounded,
                sizes=candidates.sizes,
            ),
        )

    return decide


def _even_forwards(settings: EvenSettings, choose: Choice) -> float:
    return width_forwards(choose, target=settings.target if settings.repair else "block")


def _even_method(name: str, summary: str, paper: str, choose: Choice) -> None:
    """Register a method that keeps the same widths in all free blocks."""
    method(
        order=70,
        name=name,
        summary=summary,
        paper=paper,
        settings=PrunerSettings if choose == "taylor" else EvenSettings,
        native="ratio",
        forwards=lambda _blocks, _gone, _settings: 0.0,
        apply_forwards=lambda settings, _tokens: _even_forwards(settings, choose),
    )(decide_evenly(name, choose))


@method(
    order=70,
    name="flap",
    summary="remove channels and heads that fluctuate least, by one threshold for all blocks; a bias compensates",
    paper="An et al. 2024, FLAP",
    settings=FlapSettings,
    native="ratio",
    forwards=lambda _blocks, _gone, _settings: 1.0,
    apply_forwards=lambda _settings, _tokens: width_forwards("fluctuation"),
)
def decide_flap(measurements: Measurements, settings: FlapSettings, budget: Budget) -> Sequence[PruneWidth]:
    """Let one threshold set the width of every free block.

    Raises:
        InputError: no block is free, or the budget is out of reach.
        ModelError: the modelling file cannot hold the model.
        NumericsError: NaN or infinity while measuring.
    """
    if budget.is_zero:
        return ()
    decoder = measurements.decoder
    require_width_prunable(decoder)
    free = settings.some_free_blocks(decoder.block_count)
    dense, stock, bias = dense_widths(decoder), names_every_block(decoder), settings.bias == "auto"
    sizes = width_sizes(decoder, stock=stock, bias=bias)
    multiple = rounding_for(decoder, free, settings.rounding)
    profiles = fluctuation_profiles(
        decoder,
        measurements.need_windows(),
        free,
        heads=settings.heads == "even" and not reason_against_heads(decoder),
        options=measurements.options,
    )
    widths, unrounded = Thresholds(profiles, dense, sizes, multiple, decoder.parameter_count).meet(budget)
    return (
        PruneWidth(
            method="flap",
            settings=settings.model_dump(exclude_none=True),
            widths=widths,
            choose="fluctuation",
            stock=stock,
            repair=settings.repair,
            ridge=settings.ridge,
            bias=bias,
            without_bias=blocks_without_bias(decoder, stock=stock),
            rounding=multiple,
            unrounded=unrounded,
            sizes=sizes,
        ),
    )


_even_method(
    "wanda-sp",
    "remove channels and heads of the smallest weights times activations, as many in every block",
    "An et al. 2024, FLAP (after Sun et al. 2024, Wanda)",
    "weighted-norm",
)
_even_method(
    "llm-pruner",
    "remove channels and heads that the loss depends on least to first order; first and last blocks stay",
    "Ma et al. 2023, LLM-Pruner",
    "taylor",
)

_decide_minitron_blocks = decide_evenly("minitron-width", "magnitude")


def _minitron_apply_forwards(settings: MinitronSettings, _tokens: int) -> float:
    sliced = slicing_forwards(shared=True, reconstruct=settings.repair) if settings.hidden else 0.0
    return sliced + _even_forwards(settings, "magnitude")


@method(
    order=70,
    name="minitron-width",
    summary="remove channels, heads and hidden directions of the smallest activations; the result is a stock model",
    paper="Muralidharan et al. 2024, Minitron",
    settings=MinitronSettings,
    native="ratio",
    forwards=lambda _blocks, _gone, settings: 4.0 * bool(settings.hidden),
    apply_forwards=_minitron_apply_forwards,
)
def decide_minitron(measurements: Measurements, settings: MinitronSettings, budget: Budget) -> Sequence[AnyStep]:
    """Keep the hidden directions of largest activations first if requested, then prune the widths of the rest.

    Raises:
        InputError: the hidden directions alone exceed the budget.
        ModelError: no stock model can have fewer hidden directions.
    """
    decoder, whole = measurements.decoder, measurements.decoder.parameter_count
    if budget.is_zero:
        return ()
    require_width_prunable(decoder)
    if not settings.hidden:
        return _decide_minitron_blocks(measurements, settings, budget)
    first = _fewer_directions(decoder, settings)
    if budget.knob == "hidden":
        return (first,)
    after = measurements.on(slice_hidden.apply(measurements, first))
    left = after.decoder.parameter_count
    if budget.aim in ("remove", "target_params"):
        wanted = whole * (1 - budget.value) if budget.aim == "remove" else budget.value
        if left <= wanted:
            raise InputError(
                f"hidden={settings.hidden:g}: that alone leaves {left:,} parameters, less than asked for; "
                "lower it, or ask for more."
            )
        if budget.aim == "remove":
            budget = Budget("remove", 1 - wanted / left)
    return (first, *_decide_minitron_blocks(after, settings, budget))


def _fewer_directions(decoder: Decoder, settings: MinitronSettings) -> SliceHidden:
    step = width_step(decoder, 8)
    if step is None:
        raise ModelError(
            f"{decoder.source}: no stock {decoder.anatomy.family.model_type} can have a smaller hidden state; leave "
            "hidden at 0."
        )
    width = rounded_width(settings.hidden, decoder.hidden_size, step)
    return SliceHidden(
        method="minitron-width",
        settings={"hidden": settings.hidden, "reconstruct": settings.repair},
        widths=(width,) * decoder.block_count,
        head_width=width,
        bases=(0,),
        stock=True,
        coordinates=True,
        reconstruct=settings.repair,
        sizes=stock_stream_sizes(decoder),
    )


_decide_evenly_by_surgeon = decide_evenly("obs-width", "brain-surgeon")
_FORWARDS_OF_DATABASE = 8.0


@method(
    order=70,
    name="obs-width",
    summary="greedily remove channels and heads that the others compensate for best; the result is a stock model",
    paper="secateur's own (docs/methods.md)",
    settings=SurgeonSettings,
    native="ratio",
    forwards=lambda _blocks, _gone, settings: _FORWARDS_OF_DATABASE * (settings.allocation == "global"),
    apply_forwards=lambda settings, _tokens: _even_forwards(settings, "brain-surgeon"),
)
def decide_by_surgeon(measurements: Measurements, settings: SurgeonSettings, budget: Budget) -> Sequence[PruneWidth]:
    """Keep the same widths in all free blocks, or give each its own at the least expected loss.

    Raises:
        InputError: no block is free, or the budget is out of reach.
        ModelError: with `allocation=global`, the modelling file cannot hold the model.
        NumericsError: NaN or infinity while measuring.
    """
    if settings.allocation == "uniform" or budget.is_zero:
        return _decide_evenly_by_surgeon(measurements, settings, budget)
    decoder = measurements.decoder
    require_width_prunable(decoder)
    free = settings.some_free_blocks(decoder.block_count)
    stock = names_every_block(decoder)
    sizes = width_sizes(decoder, stock=stock)
    multiple = rounding_for(decoder, free, settings.rounding)
    attention = settings.heads != "never" and not reason_against_heads(decoder)
    database = open_database(measurements, free, multiple, attention=attention)
    return (
        PruneWidth(
            method="obs-width",
            settings=settings.model_dump(exclude_none=True),
            widths=Allocation(decoder, database, sizes, budget).meet(budget),
            choose="brain-surgeon",
            stock=stock,
            repair=settings.repair,
            ridge=settings.ridge,
            target=settings.target,
            rounding=multiple,
            sizes=sizes,
        ),
    )


@applies(PruneWidth)
def apply(measurements: Measurements, step: PruneWidth) -> Applied:
    """Prune as the step says; which units remain is measured on the texts.

    Raises:
        InputError: the step was made for a model of another shape.
        ModelError: the widths of this family cannot be pruned.
        NumericsError: NaN or infinity on the way.
    """
    decoder = measurements.decoder
    if width_sizes(decoder, stock=step.stock, bias=step.bias) != step.sizes:
        raise InputError("this width-pruning step was made for a model of another shape; make a new plan for this one.")
    if step.repair:
        _warn_of_few_tokens(decoder, measurements.need_windows())
    pruned = prune_width(
        decoder,
        measurements.need_windows(),
        step.widths,
        _chooser(measurements, step.choose),
        stock=step.stock,
        refit=Refit(
            repair=step.repair,
            ridge=step.ridge,
            bias=step.bias,
            target=step.target,
            others=frozenset(step.refitted),
        ),
        gram=step.repair or step.choose == "brain-surgeon",
        options=measurements.options,
    )
    kept = step.kept_blocks(decoder.block_count)
    return Applied(keep_blocks(pruned.decoder, kept), {"repair": pruned.fits} if pruned.fits else {})


def _warn_of_few_tokens(decoder: Decoder, windows: Windows) -> None:
    """Warn if there are few tokens, with the number of windows that a fit of the widest projection needs."""
    widths = [block_widths(decoder, block) for block in range(decoder.block_count)]
    inputs = max(max(one.channels, one.heads * one.head_size) for one in widths)
    wanted = _TOKENS_PER_INPUT * inputs
    if windows.token_count < wanted:
        count = math.ceil(wanted * len(windows) / windows.token_count)
        warnings.warn(
            f"repair: {windows.token_count:,} calibration tokens are few for projections of {inputs:,} inputs; "
            f"{count} windows of {windows.seq_len} tokens would be {_TOKENS_PER_INPUT} for each.",
            SecateurWarning,
            stacklevel=4,
        )


_SCORES: dict[Choice, Callable[[torch.Tensor, InputSums], torch.Tensor]] = {
    "fluctuation": fluctuation,
    "weighted-norm": weighted_norm,
    "magnitude": magnitude,
    "activation-norm": activation_norm,
}


def _chooser(measurements: Measurements, choose: Choice) -> Choose:
    """Create the function that decides which units remain."""
    if choose == "brain-surgeon":
        return _surgeon
    if choose in _SCORES:
        score = _SCORES[choose]

        def by_score(
            _: Place, weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /
        ) -> torch.Tensor:
            return best_units(score(weight, sums).view(*units.shape[:2], -1).sum(dim=-1), keep)

        return by_score
    taylor = taylor_by_unit(measurements.decoder, measurements.need_windows(), options=measurements.options)

    def by_taylor(place: Place, _: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /) -> torch.Tensor:
        heads, channels = taylor[place.block]
        if place.part == "channels":
            scores = channels[place.expert][None]
        elif place.part == "shared":
            scores = channels[place.expert :]
        else:
            scores = _of_head_units(heads, block_widths(measurements.decoder, place.block), groups=len(units))
        return best_units(scores.to(sums.total.device), keep)

    return by_taylor


def _of_head_units(scores: torch.Tensor, dense: BlockWidths, *, groups: int) -> torch.Tensor:
    """Return scores (H+G,) as those of query heads, group by group, or as one group of whole key/value groups."""
    queries, shared = scores[: dense.heads].view(dense.groups, dense.queries), scores[dense.heads :]
    return queries if groups == dense.groups else (queries.sum(dim=1) + shared)[None]


def _surgeon(_: Place, weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /) -> torch.Tensor:
    """Choose greedily; the ridge stays small: that of the repair would lose channels on which few tokens rely."""
    moments = sums.moments
    assert moments is not None
    batch = max(1, units.shape[0] * units.shape[1] // _OBS_BATCHES)
    return cheapest_to_lose(weight, moments.gram, units, keep, batch=batch)
