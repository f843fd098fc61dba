"""REAM: merge experts of a mixture instead of removing them.

Jha et al. 2026, "REAM: Merging Improves Pruning of Experts in LLMs" (arXiv:2604.04356); departures are listed in
`surgery/experts/merging.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from secateur.methods.budget import Budget
from secateur.methods.drop_experts import ExpertSettings, experts_to_keep, require_same_experts, settings_for
from secateur.methods.method import Applied, Measurements, applies, method
from secateur.models.experts import mixture_of
from secateur.plan.experts import Average, Grouping, MergeExperts, merge_forwards
from secateur.scores.experts import frequency, reap
from secateur.surgery.experts.merging import MergeRule, merge_experts


class ReamSettings(ExpertSettings):
    """Settings of `ream`."""

    grouping: Grouping = Field(
        "nearest",
        description="each expert that goes joins the most similar one that stays (nearest), or the most salient ones "
        "take the most similar ones (salient, the paper's)",
    )
    group: int = Field(16, ge=2, description="largest number of experts merged into one")
    average: Average = Field(
        "saliency", description="weights are averaged by S_j (saliency), or by the number of tokens (frequency)"
    )
    align: bool = Field(True, description="match the channels of merged experts before averaging")


@method(
    order=60,
    name="ream",
    summary="merge experts into similar ones that stay, channels matched, block after block",
    paper="Jha et al. 2026, REAM",
    settings=ReamSettings,
    native=None,
    forwards=lambda _asked, _settings, _windows: 0.0,
    apply_forwards=lambda _asked, settings, _tokens: merge_forwards(repair=bool(settings.repair)),
    settings_for=settings_for,
)
def decide_ream(measurements: Measurements, settings: ReamSettings, budget: Budget) -> Sequence[MergeExperts]:
    """Decide how many experts stay; which, and what is merged into them, is measured when the step is applied.

    Raises:
        InputError: the budget is out of reach.
        ModelError: the model has no experts that can be merged.
    """
    mixture, settings = mixture_of(measurements.decoder), settings_for(measurements.decoder, settings)
    keep = experts_to_keep(measurements.decoder, mixture, settings, budget)
    if keep == mixture.count:
        return ()
    return (
        MergeExperts(
            method="ream",
            settings=settings.model_dump(exclude_none=True),
            sizes=mixture.sizes,
            keep=keep,
            grouping=settings.grouping,
            group=settings.group,
            average=settings.average,
            align=settings.align,
            repair=bool(settings.repair),
            ridge=settings.ridge,
        ),
    )


@applies(MergeExperts)
def apply(measurements: Measurements, step: MergeExperts) -> Applied:
    """Merge as the step says.

    Raises:
        InputError: the step was made for a model with other experts, or groups have no room for all.
        ModelError: the model has no experts that can be merged.
        NumericsError: NaN or infinity on the way.
    """
    require_same_experts(measurements.decoder, step.sizes)
    average = reap if step.average == "saliency" else frequency
    rule = MergeRule(reap, average, step.grouping, step.group, step.align)
    found = merge_experts(
        measurements.decoder,
        measurements.need_windows(),
        step.keep,
        rule,
        ridge=step.ridge if step.repair else None,
        options=measurements.options,
    )
    merged = [
        {"block": block, "into": own, "experts": list(members)}
        for block, groups in found.groups.items()
        for own, members in groups.items()
        if members
    ]
    return Applied(found.decoder, {"merged_experts": merged} | ({"repair": found.fits} if found.fits else {}))
