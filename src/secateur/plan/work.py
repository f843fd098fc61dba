"""The work of a job, in parts whose time can be measured on a model before the job runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Work:
    """How often each part of the work is done.

    A part is done once for all calibration windows and all blocks, unless it says otherwise.

    Attributes:
        forwards: passes through all blocks; one back through them counts as two or three.
        losses: passes through final norm, head and loss.
        sums: products of the inputs of the MLPs' output projections are added up.
        fits: these projections are refitted, with the ridge chosen on held-out windows; whatever the texts.
        orders: their inputs are ordered greedily by what the others cannot replace; whatever the texts.
        covariances: products of the residual stream are added up, at two points of each block.
        rotations: such a product is decomposed at two points of each block, and the weights are turned; whatever the
            texts.
    """

    forwards: float = 0.0
    losses: float = 0.0
    sums: float = 0.0
    fits: float = 0.0
    orders: float = 0.0
    covariances: float = 0.0
    rotations: float = 0.0

    @classmethod
    def of(cls, work: Work | float) -> Work:
        """Return work; a number counts passes through all blocks."""
        return work if isinstance(work, Work) else cls(forwards=work)

    @classmethod
    def total(cls, parts: Iterable[Work | float]) -> Work:
        """Return all of these together."""
        found = cls()
        for one in parts:
            found = found + one
        return found

    def __add__(self, other: Work | float) -> Work:
        """Return both together; a number counts passes through all blocks."""
        return Work(*map(sum, zip(astuple(self), astuple(Work.of(other)), strict=True)))

    __radd__ = __add__

    def on_share(self, share: float) -> Work:
        """Return the same work on this share of the texts."""
        per_token = ("forwards", "losses", "sums", "covariances")
        return replace(self, **{name: share * getattr(self, name) for name in per_token})

    def __mul__(self, times: float) -> Work:
        """Return it done so many times."""
        return Work(*(times * one for one in astuple(self)))

    __rmul__ = __mul__
