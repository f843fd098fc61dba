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

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError
from secateur.methods import apply_slicing
from secateur.methods.allocation.database import open_database
from secateur.methods.allocation.operating_point import JUDGED, Parts
from secateur.methods.allocation.refinement import Neighbours, refined
from secateur.methods.allocation.savings import Savings
from secateur.methods.allocation.sensitivity import judging_windows
from secateur.methods.allocation.widths import allocations, fading_of
from secateur.methods.asked import Asked
from secateur.methods.branch_speed import speed_by_branch
from secateur.methods.budget import Budget
from secateur.methods.global_threshold import Thresholds, fluctuation_profiles
from secateur.methods.method import Measurements, method
from secateur.methods.slice_widths import rounded_width
from secateur.methods.uniform_widths import (
    Candidates,
    EvenSettings,
    FlapSettings,
    MinitronSettings,
    PrunerSettings,
    SurgeonSettings,
    WidthSettings,
    rounding_for,
)
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.plan.hidden import SliceHidden, slicing_work
from secateur.plan.steps import AnyStep, Choice, PruneWidth, Widths, WidthSizes
from secateur.plan.width import width_work
from secateur.plan.work import Work
from secateur.surgery.hidden.stock import stock_stream_sizes, width_step
from secateur.surgery.hidden.stream_trial import with_stream
from secateur.surgery.uneven import becomes_decilm
from secateur.surgery.width.pruning import Refit
from secateur.surgery.width.target import (
    blocks_without_bias,
    dense_widths,
    names_every_block,
    reason_against_heads,
    require_width_prunable,
    width_sizes,
)


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
            _step(
                name,
                choose,
                settings,
                widths=widths,
                stock=candidates.stock,
                target=settings.target,
                rounding=1 if budget.aim == "own" else candidates.multiple,
                unrounded=unrounded,
                sizes=candidates.sizes,
            ),
        )

    return decide


def _step(name: str, choose: Choice, settings: WidthSettings, **more: Any) -> PruneWidth:
    """Return the step of a method with its settings, and how it repairs."""
    recorded = settings.model_dump(exclude_none=True)
    if isinstance(settings, SurgeonSettings):
        gone = _share_gone(more["sizes"], more["widths"])
        more |= {"candidates": settings.candidates, "align": _aligned(settings, gone)}
    return PruneWidth(
        method=name, settings=recorded, choose=choose, repair=settings.repair, ridge=settings.ridge, **more
    )


def _share_gone(sizes: WidthSizes, widths: Sequence[Widths]) -> float:
    """Return the share of the parameters that is gone at these widths."""
    return 1 - sizes.sizes_at(widths).total / sizes.sizes_at([one.dense for one in sizes.blocks]).total


def _aligned(settings: SurgeonSettings, gone: float) -> bool:
    """Return whether what branches read is refitted too: by default where a large share of the parameters goes."""
    return gone >= _MUCH if settings.align == "auto" else settings.align


def _even_work(asked: Asked, settings: EvenSettings, choose: Choice) -> Work:
    align = isinstance(settings, SurgeonSettings) and _aligned(settings, asked.share)
    return width_work(choose, settings.target, repair=settings.repair, heads=settings.heads == "even", align=align)


def _even_method(name: str, summary: str, paper: str, choose: Choice) -> None:
    """Register a method that keeps the same widths in all free blocks."""
    method(
        order=70,
        name=name,
        summary=summary,
        paper=paper,
        settings=PrunerSettings if choose == "taylor" else EvenSettings,
        native="ratio",
        forwards=lambda _asked, _settings, _windows: 0.0,
        apply_forwards=lambda asked, settings, _tokens: _even_work(asked, settings, choose),
    )(decide_evenly(name, choose))


@method(
    order=70,
    name="flap",
    summary="remove channels and heads that fluctuate least, by one threshold for all blocks; a bias compensates",
    paper="An et al. 2024, FLAP",
    settings=FlapSettings,
    native="ratio",
    forwards=lambda _asked, _settings, _windows: 1.0,
    apply_forwards=lambda _asked, settings, _tokens: width_work(
        "fluctuation", repair=settings.repair, heads=settings.heads == "even"
    ),
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
        _step(
            "flap",
            "fluctuation",
            settings,
            widths=widths,
            stock=stock,
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


def _minitron_apply_forwards(asked: Asked, settings: MinitronSettings, _tokens: int) -> Work:
    sliced = slicing_work(shared=True, reconstruct=settings.repair) if settings.hidden else Work()
    return sliced + _even_work(asked, settings, "magnitude")


@method(
    order=70,
    name="minitron-width",
    summary="remove channels, heads and hidden directions of the smallest activations; the result is a stock model",
    paper="Muralidharan et al. 2024, Minitron",
    settings=MinitronSettings,
    native="ratio",
    forwards=lambda _asked, settings, _windows: 4.0 * bool(settings.hidden),
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
    after = measurements.on(apply_slicing.apply(measurements, first))
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
    decoder = with_stream(decoder)
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


_MUCH = 1 / 3
"""Share of the parameters from which on alignment pays for its time: on SmolLM2-135M it takes 1 % of what is lost at
20 %, 0 to 5 % at 30 %, 13 to 26 % at 50 % (`benchmarks/allocation.py`)."""
_decide_evenly_by_surgeon = decide_evenly("obs-width", "brain-surgeon")
_DATABASE = Work(forwards=1.0, sums=1.0, fits=1.2, orders=2.0)
_TRIALS = 3
"""Models per block whose loss is measured for the database: half of an MLP, none, and attention on fewer tokens."""


def _surgeon_forwards(asked: Asked, settings: SurgeonSettings, windows: Windows) -> Work:
    """Return the cost of the database and of refining, in which each round prunes and runs other models."""
    if settings.allocation == "uniform":
        return Work()
    single = settings.attention == "groups"
    pruned = _even_work(asked, settings, "brain-surgeon")
    measured = judging_windows(windows).token_count / windows.token_count
    judged = judging_windows(windows, JUDGED).token_count / windows.token_count
    found = _DATABASE + _compared((_TRIALS + single) * asked.blocks * measured)
    compared = _compared((3 + single) * asked.blocks * judged)
    return found + settings.refine * (pruned + compared) + pruned * bool(settings.refine)


def _compared(models: float) -> Work:
    """Return the work of models that share the blocks below the change: half of them, and the head."""
    return Work(models / 2, losses=models)


def _removable_attention(decoder: Decoder, free: range) -> list[int]:
    """Return the blocks whose attention may go: the layout of Nemotron-NAS has one in the first block."""
    if reason_against_heads(decoder):
        return []
    return [block for block in free if block_widths(decoder, block).groups and (block or not becomes_decilm(decoder))]


@method(
    order=70,
    name="obs-width",
    summary="greedily remove channels and heads that the others compensate for best; the result is a stock model",
    paper="secateur's own (docs/methods.md)",
    settings=SurgeonSettings,
    native="ratio",
    forwards=_surgeon_forwards,
    apply_forwards=lambda asked, settings, _tokens: _even_work(asked, settings, "brain-surgeon"),
    speed_model=speed_by_branch,
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
    attention = _removable_attention(decoder, free) if settings.heads != "never" else []
    parts = Parts.of(measurements.need_windows()) if settings.refine else None
    single = settings.attention == "groups"
    few = settings.candidates
    database = open_database(measurements, free, multiple, attention, single=single, candidates=few)
    savings = Savings(decoder, sizes, budget)
    refit = Refit(repair=settings.repair, ridge=settings.ridge, target=settings.target)
    widths = savings.meet(allocations(database, savings, fading_of(decoder, refit)))
    if parts is not None:
        refit = replace(refit, align=_aligned(settings, _share_gone(sizes, widths)))
        groups = {block: (savings.dense[block].groups, 0) for block in attention} | database.levels("heads")
        near = Neighbours({"channels": database.levels("channels"), "groups": groups})
        rounds = settings.refine
        widths = refined(measurements, widths, savings, near, parts=parts, refit=refit, rounds=rounds, candidates=few)
    return (
        _step(
            "obs-width",
            "brain-surgeon",
            settings,
            widths=widths,
            stock=stock,
            target=settings.target,
            rounding=multiple,
            sizes=sizes,
        ),
    )
