"""A gate: no model that has lost what the dense one can do, whatever its perplexity.

Perplexity averages over tokens that a small model predicts as well; a probe asks for an answer that is exactly right
(`evaluation/probes.py`). With the floor c of a probe, what guessing reaches, and accuracies a of a model and A of the
dense one,

    kept = (a − c) / (A − c),

for probes of which the dense model is at least 0.1 above the floor. A model passes if it keeps the asked share of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.errors import InputError
from secateur.evaluation.probes import PROBES
from secateur.evaluation.results import Result
from secateur.evaluation.tasks import TaskRequest, ask_tasks
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions

KEPT = 0.9
"""Share of a probe that has to be kept, where none is named."""
ABOVE = 0.1
"""Accuracy above the floor from which a model counts as able to do a probe."""
_ALL, _ACCURACY = "probes", "acc"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Gate:
    """Which probes a model must not lose, and how much of them it has to keep.

    Attributes:
        probes: their names.
        kept: share of what the dense model can do beyond guessing, in (0, 1].
    """

    probes: tuple[str, ...]
    kept: float = KEPT

    @classmethod
    def read(cls, text: str) -> Gate:
        """Read `probes:0.9`, `probe-copy,probe-recall:0.8`, or names alone.

        Raises:
            InputError: no probe, or a share outside (0, 1].
        """
        named, colon, share = text.partition(":")
        names = dict.fromkeys(one.strip() for one in named.split(","))
        probes = [probe for name in names for probe in (PROBES if name == _ALL else [name])]
        wrong = [name for name in probes if name not in PROBES]
        if wrong:
            raise InputError(
                f"gate {text}: '{wrong[0]}' is no probe. A gate takes {_ALL} or some of {', '.join(PROBES)}: the "
                f"accuracy of guessing is known for them. Write {_ALL}:{KEPT}, with the share to be kept."
            )
        try:
            kept = float(share) if colon else KEPT
        except ValueError:
            kept = 0.0
        if not 0 < kept <= 1:
            raise InputError(f"gate {text}: the share to be kept is a number above 0, up to 1, such as {_ALL}:{KEPT}.")
        return cls(tuple(dict.fromkeys(probes)), kept)

    def __str__(self) -> str:
        """Write it as it is read."""
        return f"{_ALL if self.probes == tuple(PROBES) else ','.join(self.probes)}:{self.kept:g}"

    def able(self, dense: Mapping[str, float]) -> tuple[str, ...]:
        """Return the probes that the dense model can do; the gate says nothing about the others.

        Args:
            dense: its accuracy of each probe.
        """
        return tuple(name for name in self.probes if dense[name] >= PROBES[name].chance + ABOVE - _ROUNDING)

    def require(self, dense: Mapping[str, float]) -> None:
        """Refuse a gate that can tell nothing.

        Raises:
            InputError: the dense model can do none of the probes.
        """
        if not self.able(dense):
            measured = ", ".join(f"{name} {dense[name]:.2f} (floor {PROBES[name].chance:.2f})" for name in self.probes)
            raise InputError(
                f"the gate cannot be used: the dense model itself can do none of its probes ({measured}). "
                "Leave it out, or name another probe."
            )

    def failing(self, dense: Mapping[str, float], accuracies: Mapping[str, float]) -> str | None:
        """Return why a model does not pass, in one sentence; None if it does.

        Args:
            dense: the dense model's accuracy of each probe.
            accuracies: those of the model.
        """
        shares = {name: kept_of(name, dense[name], accuracies[name]) for name in self.able(dense)}
        lost = [
            f"{max(0, math.floor(100 * share + _ROUNDING))}% of {name} (accuracy {accuracies[name]:.2f}, "
            f"dense {dense[name]:.2f}, floor {PROBES[name].chance:.2f})"
            for name, share in sorted(shares.items(), key=lambda item: item[1])
            if share < self.kept - _ROUNDING
        ]
        return f"keeps {' and '.join(lost)}; the gate asks for {self.kept:.0%}" if lost else None


def kept_of(probe: str, dense: float, accuracy: float) -> float:
    """Return the share of a probe that is kept: accuracy above the floor ÷ the dense model's, negative below it."""
    floor = PROBES[probe].chance
    return (accuracy - floor) / (dense - floor)


def accuracies_in(results: Iterable[Result]) -> dict[str, float]:
    """Return the accuracies of probes among the results of one model."""
    return {one.task: one.value for one in results if one.task in PROBES and one.measure == _ACCURACY}


def accuracies_of(
    model: Decoder, gate: Gate, *, limit: int | None = None, options: RunOptions = DEFAULTS
) -> dict[str, float]:
    """Ask a model the questions of a gate; return its accuracy of each probe.

    Args:
        model: the open model; a skeleton is read into memory.
        gate: the gate.
        limit: questions of each probe; None asks all.
        options: questions per batch, progress.

    Raises:
        InputError: the model has no tokenizer, or lm-evaluation-harness is not installed.
        NumericsError: NaN or infinity among the answers.
    """
    found = ask_tasks({"model": model}, TaskRequest(names=gate.probes, limit=limit), options=options)
    return {outcome.task: outcome.metrics[_ACCURACY] for outcome in found["model"]}
