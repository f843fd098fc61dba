"""The decision as data: which edits, and what they leave. Made, shown, edited and applied separately.

A plan never holds tensors. It is a small JSON file; what can be computed from it (sizes) is written for the reader and
computed again when it is read, so an edited plan cannot contradict itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from secateur.errors import InputError
from secateur.plan.steps import AnyStep, Sizes

_DERIVED = ("parameters_before", "parameters_after", "removed_fraction")


class ModelRef(BaseModel):
    """The model a plan is for.

    Attributes:
        source: the path or hub name it was opened by.
        fingerprint: sha256 of configuration, tensor names and shapes, and the ends of each shard.
        family: its architecture.
        block_parameters: number of parameters of each block.
        other_parameters: all other parameters, tied tensors counted once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    fingerprint: str
    family: str
    block_parameters: tuple[int, ...]
    other_parameters: int


class Candidate(BaseModel):
    """A plan that was tried, or could not be made, while searching for the best.

    Attributes:
        depth: method that took blocks out first; None where none went.
        blocks: how many blocks went.
        width: method that then sliced or narrowed what was left; None without.
        parameters: of the result; None where there is none.
        loss: mean next-token loss on the held-back windows in nats; None where it was not measured.
        enough: whether what was asked for is gone; where not, another method came after, or was to come.
        refused: why there is no result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: str | None
    blocks: int | None
    width: str | None
    parameters: int | None = None
    loss: float | None = None
    enough: bool = True
    refused: str | None = None


class Search(BaseModel):
    """How a plan was found: every candidate, and which of them are best.

    Attributes:
        fitted: number of calibration windows that candidates were measured and fitted on.
        held_back: number of calibration windows, others, that their losses are of.
        dense_loss: loss of the dense model on the windows held back.
        candidates: in the order in which they were tried.
        front: places of those to which no other is preferable, being no larger and no worse; largest model first.
        best: place of the candidate that the plan holds: the least loss among those that remove enough.
        settings: of the search.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fitted: int
    held_back: int
    dense_loss: float
    candidates: tuple[Candidate, ...]
    front: tuple[int, ...]
    best: int
    settings: dict[str, Any] = Field(default_factory=dict)


class Plan(BaseModel):
    """What to do to one model.

    Attributes:
        model: the model it is for.
        steps: what is done, in order; an empty list changes nothing.
        requested: the budget as asked for, such as `{"remove": 0.25}`.
        texts: source, fingerprint and shape of the calibration windows it was measured on.
        seed: seed of everything drawn at random.
        counts_on: for a target in bytes or seconds, what it was counted on and what the plan is expected to reach.
        search: the candidates among which the steps were chosen, where that was done by trying.
        version: the secateur that made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    version: str
    model: ModelRef
    requested: dict[str, Any] = Field(default_factory=dict)
    texts: dict[str, Any] | None = None
    seed: int = 0
    steps: tuple[AnyStep, ...] = ()
    counts_on: dict[str, Any] = Field(default_factory=dict)
    search: Search | None = None

    @model_validator(mode="before")
    @classmethod
    def _ignore_derived(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k not in _DERIVED} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _applicable(self) -> Plan:
        self.sizes_after()
        return self

    def kept_blocks(self) -> tuple[int, ...]:
        """Return the blocks of the original model that are left after all steps."""
        left = tuple(range(len(self.model.block_parameters)))
        for step in self.steps:
            left = tuple(left[i] for i in step.kept(len(left)))
        return left

    def sizes_after(self) -> Sizes:
        """Return the sizes of the result."""
        sizes = Sizes(self.model.block_parameters, self.model.other_parameters)
        for step in self.steps:
            sizes = step.left(sizes)
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
        """Share of all parameters, embeddings included, that is gone afterwards (METHODS §9)."""
        return 1 - self.parameters_after / self.parameters_before

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan, also one that was edited by hand.

        Raises:
            InputError: no such file, not JSON, an unknown key, or steps that cannot be applied.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise InputError(f"{path}: the plan cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a valid plan: not text.") from error
        except ValidationError as error:
            raise InputError(f"{path}: not a valid plan: {'; '.join(_problems(error))}.") from error


def plans_in(history: Iterable[dict[str, Any]]) -> tuple[Plan, ...]:
    """Return the plans among the entries of a decoder's history, oldest first; other entries tell of healing."""
    return tuple(Plan.model_validate(entry["plan"]) for entry in history if "plan" in entry)


def blocks_kept_by(history: Iterable[dict[str, Any]], count: int) -> tuple[int, ...]:
    """Give, for each of the `count` blocks a decoder has, its number in the model its history begins with."""
    left = None
    for plan in plans_in(history):
        kept = plan.kept_blocks()
        left = kept if left is None else tuple(left[block] for block in kept)
    return tuple(range(count)) if left is None else left


def _problems(error: ValidationError) -> Iterable[str]:
    for problem in error.errors()[:3]:
        place = ".".join(str(part) for part in problem["loc"])
        yield f"{place + ': ' if place else ''}{problem['msg']}"
