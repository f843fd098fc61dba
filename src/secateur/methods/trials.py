"""Candidates of `auto`, made as `prune` would make them, and measured; nothing is made or measured twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from secateur.calibration.processes import as_the_first
from secateur.calibration.stream import mean_loss
from secateur.calibration.windows import Windows
from secateur.errors import InputError
from secateur.methods.budget import Budget, weigh
from secateur.methods.method import Evidence, Method
from secateur.methods.split_search import Split
from secateur.methods.targets import weighed
from secateur.models.decoder import Decoder
from secateur.steps import AnyStep, Sizes

SLACK = 0.05
"""Share of what is to be removed by which a candidate may miss it."""

Steps = tuple[AnyStep, ...]
Apply = Mapping[str, Callable[[Evidence, Any], Decoder]]


class Member(NamedTuple):
    """A method that takes part, and its settings."""

    method: Method
    settings: Any

    def decide(self, evidence: Evidence, budget: Budget) -> Steps:
        """Give the steps with which it meets a budget."""
        return self.method.steps(evidence, self.settings, budget)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model that has fewer blocks, or the dense one.

    Attributes:
        steps: how it was made.
        kept: blocks of the dense model that are left.
        evidence: about it.
    """

    steps: Steps
    kept: tuple[int, ...]
    evidence: Evidence


class Made(NamedTuple):
    """A candidate that was made and measured.

    Attributes:
        steps: how it is made.
        parameters: how many it has left.
        gone: blocks that it lacks.
        loss: on the windows held back.
        enough: whether what was asked for is gone.
    """

    steps: Steps
    parameters: int
    gone: int
    loss: float
    enough: bool


class Trials:
    """Makes and measures candidates; nothing twice."""

    def __init__(
        self, evidence: Evidence, held_back: Windows, budget: Budget, members: Mapping[str, Member], apply: Apply
    ) -> None:
        """Start with the dense model.

        Args:
            evidence: about it, with the windows that candidates are fitted to.
            held_back: windows that losses are of.
            budget: what every candidate has to meet.
            members: methods that take part, by name.
            apply: how each kind of step is applied.
        """
        self._budget, self._held_back = budget, held_back
        self._members, self._apply = members, apply
        self._dense = Cut((), tuple(range(evidence.decoder.block_count)), evidence)
        self._cuts: dict[tuple[str, int], Cut] = {}
        self._evidence = {evidence.decoder.fingerprint: evidence}
        self._made: dict[tuple[str, str | None], Made] = {}
        self._whole = evidence.decoder.parameter_count if budget.scale is None else budget.scale.total

    def most_blocks(self) -> int:
        """Count how many blocks can go so that something is left for the other method to do."""
        decoder = self._dense.evidence.decoder
        weights, whole = weigh(self._budget, decoder.block_parameter_counts(), decoder.parameter_count)
        lightest = sorted(weights)
        wanted = whole - self._largest()
        return sum(sum(lightest[: count + 1]) < wanted for count in range(len(lightest) - 1))

    def make(self, split: Split) -> Made:
        """Make and measure a candidate.

        Raises:
            InputError: it cannot meet the budget.
            ModelError: a method cannot cut this model.
            NumericsError: NaN or infinity on the way.
        """
        cut = self._dense if split.depth is None else self._without_blocks(split.depth, split.blocks)
        key = (cut.evidence.decoder.fingerprint, split.width)
        if key not in self._made:
            self._made[key] = self._measured(cut, split.width)
        made = self._made[key]
        return made._replace(steps=cut.steps + made.steps)

    def _without_blocks(self, name: str, blocks: int) -> Cut:
        """Take out so many blocks, or, where nothing comes after, as many as the budget asks for."""
        if (name, blocks) not in self._cuts:
            member, dense = self._members[name], self._dense.evidence
            steps = member.decide(dense, Budget("blocks", blocks)) if blocks else self._meet(self._dense, member)
            self._cuts[name, blocks] = self._after(steps, dense)
        return self._cuts[name, blocks]

    def _after(self, steps: Steps, evidence: Evidence) -> Cut:
        kept = self._dense.kept
        for step in steps:
            kept = tuple(kept[place] for place in step.kept(len(kept)))
            left = self._apply[step.kind](evidence, step)
            evidence = self._evidence.setdefault(left.fingerprint, evidence.of(left))
        return Cut(steps, kept, evidence)

    def _measured(self, cut: Cut, width: str | None) -> Made:
        evidence, steps = cut.evidence, Steps()
        decoder = evidence.decoder
        if width is not None:
            steps = self._meet(cut, self._members[width])
            for step in steps:
                decoder = self._apply[step.kind](evidence, step)
                evidence = evidence.of(decoder)
        loss = as_the_first(mean_loss(decoder, self._held_back, batch_size=evidence.batch_size))
        gone = len(self._dense.kept) - decoder.block_count
        enough = width is not None or self._is_enough(cut)
        return Made(steps, decoder.parameter_count, gone, loss, enough)

    def _meet(self, cut: Cut, member: Member) -> Steps:
        """Let a method bring a model down to the budget.

        A share to be removed is met as closely as the method can, and, where that misses it by more than the slack, by
        the largest model that removes no less.

        Raises:
            InputError: it cannot, or the model is as small as that already.
        """
        evidence = cut.evidence
        now = evidence.decoder.parameter_count
        if self._is_enough(cut):
            raise InputError("with these blocks gone nothing is left to do.")
        if self._budget.aim != "remove":
            return member.decide(evidence, self._weighed(cut, member))
        wanted = self._budget.limit(self._whole)
        steps = member.decide(evidence, Budget("remove", 1 - wanted / now))
        if _left(evidence.decoder, steps) <= self._largest():
            return steps
        return member.decide(evidence, Budget("target_params", wanted))

    def _weighed(self, cut: Cut, member: Member | None = None) -> Budget:
        """Give a target, in bytes or seconds weighed for a model at hand and the method that cuts it next."""
        decoder, scale = cut.evidence.decoder, self._budget.scale
        if scale is None:
            return self._budget
        pace = member.method.pace_of(member.settings) if member else None
        if pace is not None and scale.unit == "seconds":
            return weighed(self._budget, decoder, pace)
        return dataclasses.replace(self._budget, scale=scale.after(cut.kept, decoder.parameter_count))

    def _largest(self) -> float:
        """Give what a candidate may weigh at most."""
        if self._budget.aim != "remove":
            return self._budget.limit(self._whole)
        return self._whole * (1 - self._budget.value * (1 - SLACK))

    def _is_enough(self, cut: Cut) -> bool:
        scale = self._weighed(cut).scale
        return (cut.evidence.decoder.parameter_count if scale is None else scale.total) <= self._largest()


def _left(decoder: Decoder, steps: Steps) -> int:
    inside = decoder.block_parameter_counts()
    sizes = Sizes(inside, decoder.parameter_count - sum(inside))
    for step in steps:
        sizes = step.left(sizes)
    return sizes.total
