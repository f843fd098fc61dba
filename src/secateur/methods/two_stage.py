"""2SSP: fewer channels first, as many in every block, then attention branches.

Sandri et al. 2025, "2SSP: A Two-Stage Framework for Structured Pruning of LLMs" (TMLR). How much the two stages take
follows from the amount (equation 5): of L blocks N = round(L · s^(m / (α a))) lose their attention, s being the share
of what is inside blocks that goes, a and m the parameters of attention and MLP of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, PositiveFloat

from secateur.data.windows import Windows
from secateur.methods.asked import Asked
from secateur.methods.branch_speed import speed_by_branch
from secateur.methods.budget import Budget
from secateur.methods.drop_branches import AllWidths, BranchTarget, present_branches, without
from secateur.methods.greedy import GreedySettings, greedily
from secateur.methods.method import Measurements, apply_step, method
from secateur.methods.uniform_widths import rounded, rounding_for
from secateur.plan.steps import PruneWidth
from secateur.plan.work import Work

_SHARES = 1000
_MLP_SHARE = 3
"""Parameters of an MLP ÷ those of attention, about."""


class TwoStageSettings(GreedySettings):
    """Settings of `2ssp`."""

    alpha: PositiveFloat = Field(1.5, description="the larger, the more attention branches go (the paper's α)")
    rounding: int | None = Field(
        None, ge=1, description="channels stay in multiples of this; by default 256, 64, 8 or 1, by the MLP's width"
    )


def _forwards(asked: Asked, settings: TwoStageSettings, windows: Windows) -> Work:
    """Return the work of narrowing, and of choosing attention branches, if equation 5 lets any go."""
    count = round(asked.blocks * (asked.worth / asked.blocks) ** (_MLP_SHARE / settings.alpha))
    return settings.work(asked.blocks, count, windows) + 2.0 if count else Work()


@method(
    order=20,
    name="2ssp",
    summary="remove channels of the smallest activations, as many in every block, then attention by the loss",
    paper="Sandri et al. 2025, 2SSP",
    settings=TwoStageSettings,
    native=None,
    forwards=_forwards,
    apply_forwards=lambda _asked, _settings, _tokens: 3.0,
    speed_model=speed_by_branch,
)
def decide(measurements: Measurements, settings: TwoStageSettings, budget: Budget) -> Sequence[PruneWidth]:
    """Remove channels, then choose attention branches on the model without them.

    Raises:
        InputError: no block is free, or the budget is out of reach.
        ModelError: the modelling file cannot hold the model.
        NumericsError: NaN or infinity while measuring.
    """
    decoder = measurements.decoder
    target, free = BranchTarget(decoder, budget), settings.some_free_blocks(decoder.block_count)
    multiple = rounding_for(decoder, free, settings.rounding)
    path = list(dict.fromkeys(_at(share / _SHARES, target, free, settings.alpha, multiple) for share in range(_SHARES)))
    path = [one for one in path if one != target.dense]
    wanted = target.savings.meet(path)
    count = sum(not own.groups for own in wanted)
    narrow = tuple(
        before.model_copy(update={"channels": own.channels}) for own, before in zip(wanted, target.dense, strict=True)
    )
    first = target.step("2ssp", settings, narrow, choose="activation-norm", rounding=multiple)
    steps = () if narrow == target.dense else (first,)
    if not count:
        return steps
    after, rest = measurements, target
    if steps:
        after = measurements.on(apply_step(measurements, first).decoder)
        rest = BranchTarget(after.decoder, Budget("own", count))
    choices = [one for one in present_branches(rest.dense, free) if one[1] == "heads"]
    windows = settings.compared_on(measurements.need_windows())
    series = greedily(after, choices, windows=windows, again=settings.again)
    gone = next(found for found, _ in series if len(found) == count)
    return (*steps, rest.step("2ssp", settings, without(rest.dense, gone)))


def _at(share: float, target: BranchTarget, free: range, alpha: float, multiple: int) -> AllWidths:
    """Return widths without this share of what is inside the free blocks; the first blocks stand for any."""
    dense = target.dense
    inside = {block: target.sizes.blocks[block] for block in free}
    one, whole = inside[free[0]], dense[free[0]]
    attention = one.parameters_at(whole) - one.parameters_at(whole.model_copy(update={"groups": 0}))
    mlp = one.channel * whole.channels
    count = round(len(free) * share ** (mlp / attention / alpha)) if attention else 0
    amount = share * sum(sizes.parameters_at(dense[block]) for block, sizes in inside.items()) - count * attention
    channels = sum(inside[block].channel * dense[block].channels for block in free)
    fraction = min(1.0, max(0.0, amount / max(1, channels)))
    found = list(without(dense, [(block, "heads") for block in free[:count]]))
    for block in free:
        narrow = rounded((1 - fraction) * dense[block].channels, dense[block].channels, multiple)
        found[block] = found[block].model_copy(update={"channels": narrow})
    return tuple(found)
