"""Methods that remove attention and MLP branches of blocks separately.

* BlockPruner: Zhong et al. 2024, "BlockPruner: Fine-grained Pruning for Large Language Models".
* FinerCut: Zhang et al. 2024, "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models".
* `branches` is secateur's own, after Týr-the-Pruner and SubFit (see docs/methods/branches.md): the branches whose
  absence costs the loss least for their size, with the MLPs that remain refitted to stand in for them.

A candidate is a set of branches; the budget picks one of a growing series. Skipping a branch is exact in models whose
branches write to the residual stream directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from secateur.calibration.walk import mean_loss_of, open_store
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.methods.allocation.savings import NAMES, AllWidths, Savings
from secateur.methods.allocation.sensitivity import judging_windows
from secateur.methods.allocation.widths import fading_of, lasting
from secateur.methods.asked import Asked
from secateur.methods.branch_speed import speed_by_branch
from secateur.methods.budget import Budget, already
from secateur.methods.greedy import GreedySettings, greedily, greedy_work
from secateur.methods.method import Measurements, Settings, method
from secateur.models.decoder import Decoder
from secateur.plan.steps import PruneWidth, Widths
from secateur.plan.width import width_work
from secateur.plan.work import Work
from secateur.scores.divergence import Between, OutputChange, angle, js_divergence, kl_divergence
from secateur.scores.removal import Branch, Measure
from secateur.surgery.width.pruning import Refit
from secateur.surgery.width.target import dense_widths, names_every_block, require_width_prunable, width_sizes

_JUDGED = 2048
"""Tokens on which the branches of `branches` are compared, about."""
_BETWEEN: dict[str, Between] = {"js": js_divergence, "angular": angle}


class BranchSettings(Settings):
    """Settings of all methods that remove branches."""

    count: int | None = Field(None, ge=1, description="number of attention and MLP branches to remove; sets the amount")

    def own_amount(self) -> Budget | None:
        """Return the number of branches."""
        return None if self.count is None else Budget("own", self.count, knob="count")


class GreedyBranchSettings(BranchSettings, GreedySettings):
    """Settings of methods that remove one branch after the other."""


class FinerCutSettings(GreedyBranchSettings):
    """Settings of `finercut`."""

    distance: Literal["js", "angular"] = Field(
        "js", description="between predictions: Jensen-Shannon divergence, or the angle between the logits"
    )


class StandInSettings(BranchSettings):
    """Settings of `branches`."""

    repair: bool = Field(True, description="refit the remaining MLPs to stand in for what went")
    ridge: PositiveFloat | Literal["auto"] = Field(
        "auto", description="regularisation toward the original weights; by default chosen on held-out windows"
    )


def present_branches(dense: Sequence[Widths], free: range) -> list[Branch]:
    """Return the branches that the free blocks have, in order."""
    return [(block, part) for block in free for part, name in NAMES.items() if getattr(dense[block], name)]


def without(dense: Sequence[Widths], gone: Sequence[Branch]) -> AllWidths:
    """Return the widths of a model without these branches."""
    found = list(dense)
    for block, part in gone:
        found[block] = found[block].model_copy(update={NAMES[part]: 0})
    return tuple(found)


class BranchTarget:
    """The widths among a growing series of cuts that meet a budget."""

    def __init__(self, decoder: Decoder, budget: Budget) -> None:
        """Count the sizes of a model; the attributes are those of `PruneWidth`.

        Raises:
            InputError: the model is within the budget as it is.
            ModelError: it cannot lose branches.
        """
        require_width_prunable(decoder)
        self.stock = names_every_block(decoder)
        self.sizes = width_sizes(decoder, stock=self.stock)
        self.dense = dense_widths(decoder)
        self.savings = Savings(decoder, self.sizes, budget)
        self._budget = budget
        whole = decoder.parameter_count if budget.cost is None else budget.cost.total
        if budget.aim != "own" and budget.limit(whole) >= whole:
            raise InputError(already(budget, whole))
        self._wanted = budget.limit(whole) if budget.aim != "own" else 0.0

    def saves(self, branch: Branch) -> float:
        """Return what goes with a branch, in the unit of the budget."""
        return self.savings.of(branch[0], **{NAMES[branch[1]]: 0})

    def choose(self, series: Iterable[tuple[Branch, ...]]) -> AllWidths:
        """Return the widths; the series is read only as far as needed.

        Raises:
            InputError: the budget is out of reach.
        """
        tried: list[AllWidths] = []
        for gone in series:
            widths = without(self.dense, gone)
            if all(one.is_empty for one in widths):  # also where a block that was empty before would remain
                break
            tried.append(widths)
            if self._budget.aim == "own":
                if len(gone) == self._budget.value:
                    return widths
            elif self.savings.weight(widths) <= self._wanted:
                break
        if self._budget.aim == "own":
            raise InputError(f"count={self._budget.value}: at most {len(tried)} can be removed; one must remain.")
        return self.savings.meet(tried)

    def step(self, name: str, settings: Settings, widths: AllWidths, **more: Any) -> PruneWidth:
        """Return the step that keeps these widths; without repair unless `more` says so."""
        given: dict[str, Any] = {"choose": "magnitude", "repair": False} | more
        recorded = settings.model_dump(exclude_none=True)
        return PruneWidth(method=name, settings=recorded, widths=widths, stock=self.stock, sizes=self.sizes, **given)


def _greedy_forwards(asked: Asked, settings: GreedyBranchSettings, windows: Windows) -> Work:
    """Return the work of removing two branches for each block's worth."""
    return settings.work(2 * asked.blocks, settings.count or 2 * asked.gone, windows)


def _greedy_step(
    name: str,
    measurements: Measurements,
    settings: GreedyBranchSettings,
    budget: Budget,
    measure: Measure = mean_loss_of,
) -> Sequence[PruneWidth]:
    """Remove branches greedily by the loss without them, or by another measure."""
    target = BranchTarget(measurements.decoder, budget)
    choices = present_branches(target.dense, settings.some_free_blocks(measurements.decoder.block_count))
    windows = settings.compared_on(measurements.need_windows())
    series = greedily(measurements, choices, windows=windows, again=settings.again, measure=measure)
    return (target.step(name, settings, target.choose(gone for gone, _ in series)),)


@method(
    order=20,
    name="blockpruner",
    summary="greedily remove the attention or MLP branch whose absence costs the least loss, one after the other",
    paper="Zhong et al. 2024, BlockPruner",
    settings=GreedyBranchSettings,
    native=None,
    forwards=_greedy_forwards,
    speed_model=speed_by_branch,
)
def decide_blockpruner(
    measurements: Measurements, settings: GreedyBranchSettings, budget: Budget
) -> Sequence[PruneWidth]:
    """Remove branches greedily by the loss without them.

    Raises:
        InputError: no block is free, or the budget is out of reach.
        ModelError: the modelling file cannot hold the model.
        NumericsError: NaN or infinity while measuring.
    """
    return _greedy_step("blockpruner", measurements, settings, budget)


@method(
    order=20,
    name="finercut",
    summary="greedily remove the attention or MLP branch whose absence changes the output least",
    paper="Zhang et al. 2024, FinerCut",
    settings=FinerCutSettings,
    native=None,
    forwards=_greedy_forwards,
    speed_model=speed_by_branch,
)
def decide_finercut(measurements: Measurements, settings: FinerCutSettings, budget: Budget) -> Sequence[PruneWidth]:
    """Remove branches greedily by the change of the output distribution.

    Raises:
        InputError: no block is free, or the budget is out of reach.
        ModelError: the modelling file cannot hold the model.
        NumericsError: NaN or infinity while measuring.
    """
    with open_store(measurements.decoder) as store:
        change = OutputChange(store, _BETWEEN[settings.distance])
        return _greedy_step("finercut", measurements, settings, budget, change)


def _branches_forwards(asked: Asked, settings: StandInSettings, windows: Windows) -> Work:
    share = judging_windows(windows, _JUDGED).token_count / windows.token_count
    return greedy_work(2 * asked.blocks, settings.count or 2 * asked.gone).on_share(share)


@method(
    order=20,
    name="branches",
    summary="remove the attention and MLP branches that matter least for their size; the MLPs left stand in",
    paper="secateur's own (docs/methods/branches.md)",
    settings=StandInSettings,
    native=None,
    forwards=_branches_forwards,
    apply_forwards=lambda _asked, settings, _tokens: settings.repair * width_work("magnitude", "dense"),
    speed_model=speed_by_branch,
)
def decide_branches(measurements: Measurements, settings: StandInSettings, budget: Budget) -> Sequence[PruneWidth]:
    """Remove the branches whose absence costs the loss least for their size, one after the other.

    Raises:
        InputError: no block is free, or the budget is out of reach.
        ModelError: the modelling file cannot hold the model.
        NumericsError: NaN or infinity while measuring.
    """
    decoder = measurements.decoder
    target, free = BranchTarget(decoder, budget), settings.some_free_blocks(decoder.block_count)
    judged = judging_windows(measurements.need_windows(), _JUDGED)
    fading = fading_of(decoder, Refit(repair=settings.repair, target="dense"))

    def worth(branch: Branch) -> float:
        return target.saves(branch) / lasting(branch[0], decoder.block_count, fading)

    with open_store(decoder) as store:
        change = OutputChange(store, kl_divergence)
        choices = present_branches(target.dense, free)
        series = greedily(measurements, choices, windows=judged, size=worth, measure=change)
        widths = target.choose(gone for gone, _ in series)
    refit = {"repair": True, "ridge": settings.ridge, "target": "dense", "refitted": tuple(free)}
    return (target.step("branches", settings, widths, **(refit if settings.repair else {})),)
