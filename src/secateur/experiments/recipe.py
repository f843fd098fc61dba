"""Recipes of a run or a study as frozen settings, read from and written to YAML. Unknown keys are refused.

A run opens a model, plans and prunes it (`prune`), heals it (`heal`), evaluates it (`eval`, `bench`) and generates
samples (`generate`). A study has a grid (`compare`) in place of `prune` and `heal`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.data.texts import DEFAULT_TEXTS, Count
from secateur.errors import InputError, first_line, unknown
from secateur.evaluation.gate import Gate
from secateur.evaluation.speed import NEW_TOKENS, Timing
from secateur.evaluation.tasks import TaskRequest
from secateur.healing.data import TrainingTexts
from secateur.plan.amount import Amount, Fraction
from secateur.progress import Progress
from secateur.reading import MIB, FileKind
from secateur.run_options import LARGEST_SEED, RunOptions

RECIPE_FILE = FileKind("recipe", MIB // 4)
_MOST_VALUES = 100_000


class Section(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def plain(self) -> dict[str, Any]:
        """Return the values that were given as plain data, without defaults."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


class Cut(Section, Amount):
    """Method and amount of pruning, as for `secateur plan`."""

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)

    def amount(self) -> Amount:
        """Return the amount.

        Raises:
            InputError: several amounts.
        """
        return Amount.of({name: getattr(self, name) for name in Amount.model_fields})


class Healing(Section):
    """How the pruned model is trained, as for `secateur heal`."""

    with_: str = Field("lora", alias="with")
    texts: str | None = None
    tokens: int | str = 1_000_000
    instructions: bool = False
    seq_len: int | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    def data(self, common: Common) -> TrainingTexts:
        """Return the training texts, by default those of the recipe."""
        seq_len = self.seq_len or (None if self.instructions else common.seq_len)
        return TrainingTexts(
            source=self.texts or common.texts, tokens=self.tokens, instructions=self.instructions, seq_len=seq_len
        )


class Measuring(Section):
    """How quality is evaluated, as for `secateur eval`; `texts` defaults to the held-out part of the recipe's texts.

    `gate` adds its probes to the tasks, and the report ranks what does not pass it last.
    """

    texts: str | None = None
    windows: int | Literal["all", "auto"] = 64
    seq_len: int | None = None
    tasks: str | tuple[str, ...] | None = None
    limit: int | None = Field(default=None, ge=1)
    shots: int | None = Field(default=None, ge=0)
    stability: bool = False
    gate: str | None = None

    @model_validator(mode="after")
    def _stability_of_tasks(self) -> Measuring:
        if self.stability and self.tasks is None and self.gate is None:
            raise ValueError("stability is measured on tasks; name some, such as stdlib-cloze")
        self.asked_gate()
        return self

    def asked_gate(self) -> Gate | None:
        """Return the gate that results are held against; None if there is none.

        Raises:
            InputError: it names what is no probe, or an impossible share.
        """
        return None if self.gate is None else Gate.read(self.gate)

    def request(self) -> TaskRequest | None:
        """Return the requested tasks, and the probes of the gate; None if none are named.

        Raises:
            InputError: an unknown task.
        """
        gate = self.asked_gate()
        tasks = [*([self.tasks] if isinstance(self.tasks, str) else self.tasks or ()), *(gate.probes if gate else ())]
        if not tasks:
            return None
        return TaskRequest.of(tasks, limit=self.limit, shots=self.shots, stability=self.stability)


class SpeedSection(Section, Timing):
    """How speed and memory are measured, as for `secateur bench`."""

    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: int = Field(default=NEW_TOKENS, ge=2)
    repeats: int = Field(default=5, ge=1)
    warmup: int = Field(default=1, ge=0)


class Samples(Section):
    """How many samples the model generates, as continuations of held-out text."""

    prompts: int = Field(2, ge=1)
    tokens: int = Field(48, ge=1)


class Common(Section):
    """Shared by runs and studies: the model, how it is opened, its texts, and how the results are measured."""

    model: str
    description: str | None = None
    texts: str = DEFAULT_TEXTS
    windows: int | Literal["all", "auto"] = 32
    seq_len: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    batch_size: int | None = Field(default=None, ge=1)
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    skeleton: bool | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    check: bool = True
    eval: Measuring | None = Measuring()
    bench: SpeedSection | None = None
    generate: Samples | None = None

    def opening(self) -> dict[str, Any]:
        """Return how models are opened, as arguments of `open_model`."""
        names = {"dtype", "device", "revision", "skeleton", "tokenizer", "trust_remote_code", "allow_pickle"}
        return self.model_dump(include=names)

    def reading(self) -> dict[str, Any]:
        """Return the calibration texts, as arguments of `make_plan` and `score`."""
        return {"texts": self.texts, "windows": count_of(self.windows), "seq_len": self.seq_len}

    def measuring(self) -> dict[str, Any]:
        """Return what is measured, as arguments of `evaluate`."""
        asked = self.eval or Measuring()
        return {
            "texts": asked.texts or self.texts,
            "windows": count_of(asked.windows),
            "seq_len": asked.seq_len or self.seq_len,
            "tasks": asked.request(),
        }

    def asked_gate(self) -> Gate | None:
        """Return the gate that results are held against; None if there is none."""
        return None if self.eval is None else self.eval.asked_gate()

    def options(self, progress: Progress, work: Path | None = None) -> RunOptions:
        """Return the run options."""
        return RunOptions(batch_size=self.batch_size, seed=self.seed, progress=progress, work=work)

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)


class Recipe(Common):
    """Recipe of a single run."""

    prune: Cut
    heal: Healing | None = None


class Entry(Section):
    """A method of a study with its own settings; `name` distinguishes two entries of the same method."""

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    name: str | None = None


class Grid(Section):
    """Methods × amounts × healing recipes; the recipe `none` leaves the pruned model untrained."""

    methods: tuple[str | Entry, ...] = Field(min_length=1)
    remove: tuple[Fraction, ...] = Field(min_length=1)
    heal: tuple[Literal["none"] | Healing, ...] = ("none",)


class Study(Common):
    """Recipe of a study: a grid of runs on one model."""

    compare: Grid


def read_recipe(path: str | Path) -> Recipe | Study:
    """Read a recipe from a YAML file: a study if it has the key `compare`, otherwise a run.

    Raises:
        InputError: no such file, not YAML, an unknown or missing key, or an invalid value.
    """
    data = RECIPE_FILE.parsed(Path(path), _from_yaml)
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a recipe; it says what to do by keys such as model and prune.")
    return as_recipe(data, str(path))


def _from_yaml(text: str) -> Any:
    """Return the data of a YAML text.

    Raises:
        InputError: not YAML, or it repeats parts of itself (by aliases) until they are too many.
    """
    try:
        data = yaml.safe_load(text)  # the faster loader in C crashes where lists are nested deeply
    except yaml.YAMLError as error:
        where = f"line {mark.line + 1}: " if (mark := getattr(error, "problem_mark", None)) else ""
        raise InputError(f"{where}not YAML ({getattr(error, 'problem', None) or first_line(error)}).") from error
    left = [data]
    for _ in range(_MOST_VALUES):
        if not left:
            return data
        one = left.pop()
        left += [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
    raise InputError(f"more than {_MOST_VALUES:,} values.")


def as_recipe(data: dict[str, Any], where: str) -> Recipe | Study:
    """Check a recipe given as plain data; messages mention `where` it comes from.

    Raises:
        InputError: an unknown or missing key, or an invalid value.
    """
    kind: type[Recipe | Study] = Study if "compare" in data else Recipe
    try:
        return kind.model_validate(data)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except ValidationError as error:
        raise InputError(f"{where}: {_problem(kind, error)}") from error


_UNIONS = ("str", "Entry", "Healing", "literal['none']")
"""Names that pydantic inserts into the path to a value of a union type."""


def _problem(kind: type[Section], error: ValidationError) -> str:
    """Return the first problem as text; for an unknown key, list the known ones."""
    kinds = [one["type"] for one in error.errors()]
    first = error.errors()[kinds.index("extra_forbidden") if "extra_forbidden" in kinds else 0]
    path = tuple(part for part in first["loc"] if part not in _UNIONS)
    place = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return str(unknown("key", place, _keys_at(kind, first["loc"][:-1])))
    if first["type"] == "missing":
        return f"{place} is missing."
    return f"{place}: {first['msg'].removeprefix('Value error, ')}."


def _keys_at(kind: type[Section], place: tuple[Any, ...]) -> list[str]:
    """Return the keys of a section, prefixed with its path; for an invalid path, those of the whole recipe."""
    owners: dict[str, type[Section]] = {
        "prune": Cut,
        "heal": Healing,
        "eval": Measuring,
        "bench": SpeedSection,
        "generate": Samples,
        "compare": Grid,
        "Entry": Entry,
        "Healing": Healing,
    }
    owner = next((owners[part] for part in reversed(place) if part in owners), kind)
    prefix = "".join(f"{part}." for part in place if part not in _UNIONS)
    return [f"{prefix}{field.alias or name}" for name, field in owner.model_fields.items()]


def count_of(windows: int | Literal["all", "auto"]) -> Count:
    """Return the number of windows, None for all; `auto` stays."""
    return None if windows == "all" else windows
