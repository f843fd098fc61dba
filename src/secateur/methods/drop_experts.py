"""Methods that remove experts of a mixture; they differ in which.

* REAP: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression" (arXiv:2510.13999).
* Expert frequency and expert activation norm (EAN) are the baselines of that paper.

Every block keeps the same number, so that the result is a stock model; experts are scored on the dense model in one
walk. Departure from the paper: router weights are renormalised over the experts chosen for a token in every family,
also where the model itself does not do that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, PositiveFloat

from secateur.calibration.routing import RoutingSums, measure_routing
from secateur.errors import InputError, SecateurWarning
from secateur.methods.budget import Budget, choose_size
from secateur.methods.method import Applied, Measurements, MethodSettings, applies, method
from secateur.models.decoder import Decoder
from secateur.models.experts import Mixture, mixture_of
from secateur.plan.experts import DropExperts, RefitExperts, refit_forwards
from secateur.scores.experts import SALIENCY, Criterion, super_experts
from secateur.surgery.experts.refit import refit_experts, require_repairable
from secateur.surgery.experts.removal import best_experts, drop_experts, require_stock_count
from secateur.surgery.width.pruning import writes_stream


class ExpertSettings(MethodSettings):
    """Settings of methods that leave fewer experts."""

    experts: int | None = Field(None, ge=1, description="number of experts to keep in every block; sets the amount")
    divisor: int = Field(
        1, ge=1, description="the number of experts stays a multiple of this, such as the degree of expert parallelism"
    )
    repair: bool | Literal["auto"] = Field(
        "auto",
        description="refit what the remaining experts write by least squares, where that is better on held-out "
        "windows; by default unless a norm is between them and the residual stream",
    )
    ridge: PositiveFloat | Literal["auto"] = Field(
        "auto", description="regularisation toward the original weights; by default chosen on held-out windows"
    )

    def own_amount(self) -> Budget | None:
        """Return the number of experts, if it is given."""
        return None if self.experts is None else Budget("own", self.experts, knob="experts")


class DropSettings(ExpertSettings):
    """Settings of methods that drop experts."""

    protect_super: bool = Field(
        False, description="keep the few experts that write massive activations (super experts), whatever their score"
    )


Given = TypeVar("Given", bound=ExpertSettings)


def settings_for(decoder: Decoder, settings: Given) -> Given:
    """Return the settings as they are for a model: whether it is repaired.

    Raises:
        InputError: the number of experts is not what the model's router and the divisor allow.
        ModelError: the model has no experts that can be removed, or none that can be repaired where that is asked for.
    """
    mixture, amount = mixture_of(decoder), settings.own_amount()
    if amount is not None:
        experts_to_keep(decoder, mixture, settings, amount)
    if settings.repair is True:
        require_repairable(decoder)
    if settings.repair == "auto":
        return settings.model_copy(update={"repair": writes_stream(decoder)})
    return settings


def experts_to_keep(decoder: Decoder, mixture: Mixture, settings: ExpertSettings, budget: Budget) -> int:
    """Return the number of experts in each block that meets the budget.

    Raises:
        InputError: it is out of reach, or not what the model's router and the divisor allow.
    """
    multiple, fewest = mixture.multiple(settings.divisor), mixture.fewest(settings.divisor)
    if budget.aim == "own":
        keep = int(budget.value)
        if keep > mixture.count:
            raise InputError(f"experts={keep}: the model has only {mixture.count} in a block.")
        if keep % settings.divisor:
            raise InputError(f"experts={keep}: not a multiple of divisor={settings.divisor}.")
        require_stock_count(mixture, keep)
        return keep
    counts = [count for count in range(mixture.count - 1, fewest - 1, -1) if count % multiple == 0]
    if not counts:
        raise InputError(
            f"{decoder.source}: none of its {mixture.count} experts in a block can go: each token is sent to "
            f"{mixture.chosen}, and their number stays a multiple of {multiple}."
        )
    total = decoder.parameter_count
    left = [
        total - sum(max(0, one.count - count) * one.parameters for one in mixture.sizes if one is not None)
        for count in counts
    ]
    return counts[choose_size(budget, left, total)]


def warn_of_idle(sums: Sequence[RoutingSums | None]) -> None:
    """Warn of experts that no token was sent to."""
    idle = {index: int((one.load == 0).sum()) for index, one in enumerate(sums) if one is not None}
    blocks = [index for index, count in idle.items() if count]
    if blocks:
        warnings.warn(
            f"{sum(idle.values())} experts in {len(blocks)} blocks never fire on these texts (most in block "
            f"{max(blocks, key=lambda index: idle[index])}); if they are for other texts, calibrate on those too.",
            SecateurWarning,
            stacklevel=4,
        )


def decide_by(criterion: Criterion) -> Callable[[Measurements, DropSettings, Budget], Sequence[DropExperts]]:
    """Create the function that keeps the experts of highest score."""

    def decide(measurements: Measurements, settings: DropSettings, budget: Budget) -> Sequence[DropExperts]:
        decoder = measurements.decoder
        mixture, settings = mixture_of(decoder), settings_for(decoder, settings)
        keep = experts_to_keep(decoder, mixture, settings, budget)
        if keep == mixture.count:
            return ()
        if "routing" not in measurements.cache:
            found = measure_routing(decoder, measurements.need_windows(), mixture, options=measurements.options)
            warn_of_idle(found)
            measurements.cache["routing"] = found
        sums = measurements.cache["routing"]
        scores = [None if one is None else SALIENCY[criterion](one) for one in sums]
        ranks = scores
        if settings.protect_super:
            ranks = [
                None if score is None or own is None else score.masked_fill(own, torch.inf)
                for score, own in zip(scores, super_experts(sums), strict=True)
            ]
        step: dict[str, Any] = {
            "method": criterion,
            "settings": settings.model_dump(exclude_none=True),
            "sizes": mixture.sizes,
            "kept": tuple(() if one is None else best_experts(one, keep, mixture.groups) for one in ranks),
            "scores": tuple(() if one is None else tuple(float(f"{value:.4g}") for value in one) for one in scores),
        }
        return (RefitExperts(**step, ridge=settings.ridge) if settings.repair else DropExperts(**step),)

    return decide


def _drop_method(name: Criterion, summary: str, paper: str) -> None:
    method(
        order=60,
        name=name,
        summary=summary,
        paper=paper,
        settings=DropSettings,
        native=None,
        forwards=lambda _asked, _settings, _windows: 2.0,
        apply_forwards=lambda _asked, settings, _tokens: refit_forwards() if settings.repair else 0.0,
        settings_for=settings_for,
    )(decide_by(name))


_drop_method(
    "reap",
    "remove the experts that write least, weighted by the router, where they are used",
    "Lasby et al. 2025, REAP",
)
_drop_method(
    "expert-frequency",
    "remove the experts that are chosen for the fewest tokens",
    "baseline of Lasby et al. 2025, REAP",
)
_drop_method(
    "expert-activation",
    "remove the experts whose outputs sum up to least (expert activation norm, EAN)",
    "baseline of Lasby et al. 2025, REAP",
)


@applies(DropExperts)
def apply(measurements: Measurements, step: DropExperts) -> Decoder:
    """Remove the experts that the step does not keep.

    Raises:
        InputError: the step was made for a model with other experts.
        ModelError: the model has no experts that can be removed.
    """
    require_same_experts(measurements.decoder, step.sizes)
    return drop_experts(measurements.decoder, step.kept, options=measurements.options)


@applies(RefitExperts)
def apply_and_refit(measurements: Measurements, step: RefitExperts) -> Applied:
    """Remove the experts that the step does not keep, and refit the others.

    Raises:
        InputError: the step was made for a model with other experts.
        ModelError: the model has no experts that can be removed, or a norm behind them.
        NumericsError: NaN or infinity on the way.
    """
    require_same_experts(measurements.decoder, step.sizes)
    found = refit_experts(
        measurements.decoder,
        measurements.need_windows(),
        step.kept,
        ridge=step.ridge,
        options=measurements.options,
    )
    return Applied(found.decoder, {"repair": found.fits})


def require_same_experts(decoder: Decoder, sizes: Sequence[object]) -> None:
    """Refuse a step that was made for a model with other experts.

    Raises:
        InputError: saying so.
        ModelError: the model has no experts that can be removed.
    """
    if mixture_of(decoder).sizes != sizes:
        raise InputError("this step is for a mixture of other experts; make a new plan for this model.")
