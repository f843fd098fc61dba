"""Results: one JSON line per measurement, with everything needed to reproduce it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from secateur.errors import InputError
from secateur.files import replace_file
from secateur.models.decoder import Decoder
from secateur.reading import MIB, FileKind, from_json
from secateur.versions import versions

RESULTS_FILE = FileKind("list of results", 256 * MIB, advice="Measure again.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement.

    Attributes:
        measure: what was measured, such as `perplexity`.
        value: its value.
        role: `model`, or `against` for the model it is compared with in the same run.
        model: path or hub name.
        fingerprint: of the model.
        parameters: number of parameters, tied tensors once.
        blocks: number of blocks.
        task: the task it belongs to, or `average` over the tasks of the run; None for other measures.
        ratio: to the model it is compared with, if the two were measured in turn (the median over rounds).
        spread: uncertainty: `stderr` of a mean over questions; `low` and `high`, quartiles of repeated measurements.
        texts: source, fingerprint, windows, seq_len, seed and bos of the texts.
        settings: dtype, device and everything else that affects the value.
        versions: of the software.
    """

    measure: str
    value: float
    role: str
    model: str
    fingerprint: str
    parameters: int
    blocks: int
    task: str | None = None
    ratio: float | None = None
    spread: dict[str, float] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self)


def result_of(model: Decoder, role: str, measure: str, value: float, **more: Any) -> Result:
    """Return a result for an open model, with the facts common to all measurements."""
    arithmetic = {"dtype": str(model.module.dtype).removeprefix("torch."), "device": str(model.device)}
    return Result(
        measure=measure,
        value=value,
        role=role,
        model=model.source,
        fingerprint=model.fingerprint,
        parameters=model.parameter_count,
        blocks=model.block_count,
        settings=arithmetic | more.pop("settings", {}),
        versions=versions(),
        **more,
    )


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Append results to a `results.jsonl` file."""
    with path.open("a", encoding="utf-8") as stream:
        for result in results:
            stream.write(json.dumps(result.as_dict()) + "\n")


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Replace a `results.jsonl` file atomically."""
    replace_file(path, "".join(json.dumps(result.as_dict()) + "\n" for result in results))


def read_results(path: str | Path) -> tuple[Result, ...]:
    """Read a `results.jsonl` file, or the one in a folder.

    Raises:
        InputError: no such file, or a line that is not a result of this version.
    """
    path = Path(path)
    file = path / "results.jsonl" if path.is_dir() else path
    found = []
    for number, line in enumerate(RESULTS_FILE.text(file).splitlines(), 1):
        try:
            data = from_json(line)
            Result(**data)  # refuses unknown keys, which a type adapter ignores
            one = _RESULT.validate_python(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: not a result of this version; measure again.") from error
        if not math.isfinite(one.value):
            raise InputError(f"{file}, line {number}: {one.measure} is {one.value}; measure again.")
        found.append(one)
    return tuple(found)


_RESULT = TypeAdapter(Result)
