"""The decision as data: which edits, and the resulting sizes. Made, shown, edited and applied separately.

A plan never holds tensors. It is a small JSON file; derived values (sizes) are written for the reader and recomputed
when it is read, so an edited plan cannot contradict itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from secateur.errors import InputError
from secateur.files import replace_file
from secateur.plan.format_1 import from_format_1
from secateur.plan.records import Amount, TargetRecord, TextsRecord
from secateur.plan.step import AnyStep, Sizes
from secateur.plan.units import BlockChange, Removal, UnitKind
from secateur.reading import MIB, FileKind, from_json
from secateur.run_options import LARGEST_SEED

PLAN_FILE = FileKind("plan", 64 * MIB)

_DERIVED = ("parameters_before", "parameters_after", "removed_fraction")


class ModelRef(BaseModel):
    """The model a plan is for.

    Attributes:
        source: the path or hub name it was opened by.
        fingerprint: sha256 of configuration, tensor names and shapes, and the ends of each shard.
        family: its architecture.
        block_parameters: number of parameters of each block.
        other_parameters: all other parameters, tied tensors counted once.
        units: number of units in each block, by kind, where known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    fingerprint: str
    family: str
    block_parameters: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    other_parameters: int = Field(ge=0)
    units: dict[UnitKind, tuple[int, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _counts_every_block(self) -> ModelRef:
        for kind, counts in self.units.items():
            if len(counts) != len(self.block_parameters):
                raise InputError(f"the plan counts {kind.plural} of {len(counts)} blocks, not of all the model has.")
        return self

    def sizes(self) -> Sizes:
        """Return the sizes of the model."""
        return Sizes(self.block_parameters, self.other_parameters, self.units)


class Candidate(BaseModel):
    """A plan that the search tried, or could not make.

    Attributes:
        depth: method that removed blocks first; None if none did.
        blocks: number of blocks removed.
        experts: method that then left fewer experts; None if none did.
        share: what it took of what was left to remove; None if all.
        width: method that then sliced or width-pruned the remaining model; None if none did.
        parameters: of the result; None if there is none.
        loss: mean next-token loss on the held-back windows in nats; None if it was not measured.
        enough: whether the requested amount was removed; if not, another method followed, or was to follow.
        refused: why there is no result, or why a measured one was passed over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: str | None
    blocks: int | None
    width: str | None
    experts: str | None = None
    share: float | None = None
    parameters: int | None = None
    loss: float | None = None
    enough: bool = True
    refused: str | None = None

    @property
    def label(self) -> str:
        """Return a name such as `replaceme (2) + reap (50 %) + obs-width`."""
        depth = self.depth and self.depth + (f" ({self.blocks})" if self.blocks else "")
        return " + ".join(part for part in (depth, self.experts_label, self.width) if part)

    @property
    def experts_label(self) -> str | None:
        """Return the method of experts with its share of what was left to remove, such as `reap (50 %)`."""
        return self.experts and self.experts + (f" ({self.share:.0%})".replace("%", " %") if self.share else "")


class Search(BaseModel):
    """How a plan was found: every candidate, and which of them are best.

    Attributes:
        fitted: number of calibration windows on which candidates were measured and fitted.
        held_back: number of other calibration windows, on which their losses were measured.
        dense_loss: loss of the dense model on the held-back windows.
        candidates: in the order in which they were tried.
        front: indices of the candidates on the Pareto front of size and loss; largest model first.
        best: index of the candidate that the plan holds: the lowest loss among those that remove enough and are not
            refused.
        settings: of the search.
        probes: the dense model's accuracy of each probe of the gate; empty without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fitted: int
    held_back: int
    dense_loss: float
    candidates: tuple[Candidate, ...]
    front: tuple[int, ...]
    best: int
    settings: dict[str, Any] = Field(default_factory=dict)
    probes: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _points_at_candidates(self) -> Search:
        if not all(0 <= place < len(self.candidates) for place in (*self.front, self.best)):
            raise ValueError("the search points at candidates it does not hold")
        return self


class Plan(BaseModel):
    """What to do to one model.

    Attributes:
        model: the model it is for.
        steps: the edits, in order; an empty list changes nothing.
        requested: the budget as requested, such as `{"remove": 0.25}`.
        texts: source, fingerprint and shape of the calibration windows.
        seed: random seed.
        counts_on: for a target in bytes or seconds, what it is based on and what the plan is expected to reach.
        search: the candidates among which the steps were chosen, if there was a search.
        version: the version of secateur that made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    version: str
    model: ModelRef
    requested: dict[str, Amount] = Field(default_factory=dict)
    texts: TextsRecord | None = None
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    steps: tuple[AnyStep, ...] = ()
    counts_on: TargetRecord = Field(default_factory=dict)
    search: Search | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_older_and_derived(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if key not in _DERIVED}
        return from_format_1(data) if data.get("format") == 1 else data

    @model_validator(mode="after")
    def _applicable(self) -> Plan:
        self.sizes_after()
        return self

    def kept_blocks(self) -> tuple[int, ...]:
        """Return the blocks of the original model that remain after all steps."""
        left = tuple(range(len(self.model.block_parameters)))
        for step in self.steps:
            left = tuple(left[i] for i in step.kept_blocks(len(left)))
        return left

    def removes(self) -> tuple[Removal, ...]:
        """Return the removed units, step by step."""
        found: list[Removal] = []
        sizes = self.model.sizes()
        for step in self.steps:
            found += step.removes(sizes)
            sizes = step.sizes_after(sizes)
        return tuple(found)

    def block_changes(self, numbers: Sequence[int]) -> Iterator[tuple[int, BlockChange]]:
        """Yield what each step does to each block it changes, by block number.

        Args:
            numbers: the number, used in the text too, of each block of the model the plan is for.
        """
        sizes, left = self.model.sizes(), list(numbers)
        for step in self.steps:
            for place, change in step.block_changes(sizes, left).items():
                yield left[place], change
            left = [left[place] for place in step.kept_blocks(len(left))]
            sizes = step.sizes_after(sizes)

    def sizes_after(self) -> Sizes:
        """Return the sizes of the result."""
        sizes = self.model.sizes()
        for step in self.steps:
            sizes = step.sizes_after(sizes)
        return sizes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def parameters_before(self) -> int:
        """All parameters of the model, tied tensors counted once."""
        return sum(self.model.block_parameters) + self.model.other_parameters

    @computed_field  # type: ignore[prop-decorator]
    @property
    def parameters_after(self) -> int:
        """All parameters of the result."""
        return self.sizes_after().total

    @computed_field  # type: ignore[prop-decorator]
    @property
    def removed_fraction(self) -> float:
        """Share of all parameters, embeddings included, that is removed."""
        return 1 - self.parameters_after / self.parameters_before

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            InputError: it cannot be written.
        """
        replace_file(Path(path), self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan, also one that was edited by hand.

        Raises:
            InputError: no such file, not JSON, an unknown key, or steps that cannot be applied.
        """
        return PLAN_FILE.parsed(Path(path), cls._from_text)

    @classmethod
    def _from_text(cls, text: str) -> Plan:
        try:
            return cls.model_validate(from_json(text))
        except ValidationError as error:
            raise InputError("; ".join(_problems(error))) from error


def plans_in(history: Iterable[dict[str, Any]]) -> tuple[Plan, ...]:
    """Return the plans among the entries of a decoder's history, oldest first; other entries describe healing.

    Raises:
        InputError: one cannot be read: it is of a later format, or has steps of a package that is not installed.
    """
    return tuple(_recorded(entry["plan"]) for entry in history if "plan" in entry)


def _recorded(data: Any) -> Plan:
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise InputError(f"the checkpoint's record holds no valid plan: {'; '.join(_problems(error))}.") from error


def blocks_kept_by(history: Iterable[dict[str, Any]], count: int) -> tuple[int, ...]:
    """Return, for each of the `count` blocks a decoder has, its number in the model its history begins with."""
    left = None
    for plan in plans_in(history):
        kept = plan.kept_blocks()
        left = kept if left is None else tuple(left[block] for block in kept)
    return tuple(range(count)) if left is None else left


def _problems(error: ValidationError) -> Iterable[str]:
    for problem in error.errors()[:3]:
        place = ".".join(str(part) for part in problem["loc"])
        yield f"{place + ': ' if place else ''}{problem['msg']}"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, by their first cost, lowest first.

    A point dominates another if it is no higher in both costs and lower in one; of equal points the first counts.
    """
    front: list[int] = []
    least = math.inf
    for place in sorted(range(len(points)), key=lambda one: (*points[one], one)):
        if points[place][1] < least:
            front.append(place)
            least = points[place][1]
    return front
