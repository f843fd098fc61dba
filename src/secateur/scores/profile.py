"""The redundancy scores of one model as data: what was measured, and scores derived from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field, model_validator

from secateur.data.windows import Windows
from secateur.errors import InputError, NumericsError
from secateur.files import replace_file
from secateur.plan.records import TextsRecord
from secateur.reading import MIB, FileKind, from_json
from secateur.scores.routing import Routing

SCORES_FILE = FileKind("scores file", 256 * MIB)

Matrix = tuple[tuple[float, ...], ...]
Kind = Literal["cosine", "angular", "magnitude", "cka", "perplexity", "taylor", "experts"]

KINDS: tuple[Kind, ...] = ("cosine", "angular", "magnitude", "cka", "perplexity", "taylor", "experts")
ONE_PASS: tuple[Kind, ...] = ("cosine", "angular", "magnitude", "cka")


class Scores(BaseModel):
    """Redundancy scores of one model on one set of windows; scores that were not requested are None.

    Attributes:
        cosine: (L+1)×(L+1), mean over tokens of the cosine between residual states a and b (before the final norm).
        angular: (L+1)×(L+1), mean over windows of arccos(cosine)/π at the last real token.
        relative_magnitude: L values, mean over tokens of ‖f(X)−X‖ / ‖f(X)‖ (Samragh et al. 2023).
        magnitude: L values, Σ|w| over the weight matrices and norms of each block.
        cka_linear, cka_rbf: L×L, centred kernel alignment between block outputs.
        removal_perplexity: L values, perplexity with each block skipped; `perplexity` is that of the whole model.
        taylor: L values, Σ|w·∂L/∂w|.
        routing: what the routers of a mixture of experts do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str
    fingerprint: str
    texts: TextsRecord | None = None
    cosine: Matrix | None = None
    angular: Matrix | None = None
    relative_magnitude: tuple[float, ...] | None = None
    magnitude: tuple[float, ...] | None = None
    cka_linear: Matrix | None = None
    cka_rbf: Matrix | None = None
    perplexity: float | None = None
    removal_perplexity: tuple[float, ...] | None = None
    taylor: tuple[float, ...] | None = None
    routing: Routing | None = None

    @model_validator(mode="before")
    @classmethod
    def _ignore_derived(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key not in ("block_influence", "layer_redundancy")}
        return data

    @model_validator(mode="after")
    def _finite(self) -> Scores:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, tuple | float) and not np.isfinite(np.asarray(value, dtype=float)).all():
                raise NumericsError(f"score '{name}' holds NaN or infinity.")
        return self

    @model_validator(mode="after")
    def _of_one_model(self) -> Scores:
        counts = set()
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, tuple):
                counts.add(len(value) - (name in ("cosine", "angular")))
                if any(isinstance(row, tuple) and len(row) != len(value) for row in value):
                    raise ValueError(f"'{name}' is not square")
            elif isinstance(value, Routing):
                counts.add(len(value.blocks))
        if counts and min(counts) < 1:
            raise ValueError("there are scores of no blocks")
        if len(counts) > 1:
            raise ValueError("the scores differ in their number of blocks")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def block_influence(self) -> tuple[float, ...] | None:
        """BI(l) = 1 − E cos(X^l, X^{l+1}) (Men et al. 2024, ShortGPT, section 3.1); small means redundant."""
        return None if self.cosine is None else tuple(1 - value for value in self.window_cosine(1))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def layer_redundancy(self) -> tuple[float, ...] | None:
        """LR(l) = E cos(X^l, X^{l+1}), min-max normalised to [0, 1] (Dumitru et al. 2024); 1 is most redundant."""
        if self.cosine is None:
            return None
        values = self.window_cosine(1)
        low, high = min(values), max(values)
        return tuple((v - low) / (high - low) if high > low else 1.0 for v in values)

    def window_cosine(self, length: int) -> tuple[float, ...]:
        """Return C(l, n) = E cos(X^l, X^{l+n}) for every start l (Chen et al. 2024, LLM-Streamline, section 3.1)."""
        return _diagonal(self._need("cosine"), length)

    def window_angle(self, length: int) -> tuple[float, ...]:
        """Return the mean angular distance A(l, n) for every start l (Gromov et al. 2024, section 3.2)."""
        return _diagonal(self._need("angular"), length)

    def _need(self, name: str) -> Matrix:
        value: Matrix | None = getattr(self, name)
        if value is None:
            raise InputError(f"these scores do not hold '{name}'; measure it first.")
        return value

    def has(self, kinds: Iterable[Kind]) -> bool:
        """Return whether all of these kinds were measured."""
        fields = {"cka": "cka_linear", "perplexity": "removal_perplexity", "experts": "routing"}
        return all(getattr(self, fields.get(kind, kind)) is not None for kind in kinds)

    def are_of(self, windows: Windows) -> bool:
        """Return whether they were measured on these windows."""
        return (self.texts or {}).get("fingerprint") == windows.fingerprint

    def write(self, path: Path) -> None:
        """Write `scores.json`."""
        replace_file(path, json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Scores:
        """Read `scores.json`.

        Raises:
            InputError: no such file, or not a scores file.
        """
        return SCORES_FILE.parsed(Path(path), lambda text: cls.model_validate(from_json(text)))


def _diagonal(matrix: Matrix, offset: int) -> tuple[float, ...]:
    if not 1 <= offset < len(matrix):
        raise InputError(f"a window of {offset} blocks; this model has {len(matrix) - 1}.")
    return tuple(matrix[start][start + offset] for start in range(len(matrix) - offset))
