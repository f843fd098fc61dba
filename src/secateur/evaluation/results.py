"""One JSON line per measurement, with all that is needed to believe it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number.

    Attributes:
        measure: what was measured, such as `perplexity`.
        value: the number.
        role: `model`, or `against` for the model it is compared with in the same run.
        model: path or hub name.
        fingerprint: of the model.
        parameters: number of parameters, tied tensors once.
        blocks: number of blocks.
        texts: source, fingerprint, windows, seq_len, seed and bos of the texts.
        settings: dtype, device and whatever else changes the number.
        versions: of the software.
    """

    measure: str
    value: float
    role: str
    model: str
    fingerprint: str
    parameters: int
    blocks: int
    texts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return asdict(self)


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Add results to a `results.jsonl` file."""
    with path.open("a", encoding="utf-8") as stream:
        for result in results:
            stream.write(json.dumps(result.as_dict()) + "\n")
