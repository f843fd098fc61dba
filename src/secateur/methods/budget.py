"""One budget for all methods: how much has to go, and the candidate that comes closest (METHODS §9)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.errors import InputError

Native = Literal["blocks", "slice", "ratio"]
"""What a method counts in by itself."""

Aim = Literal["blocks", "slice", "ratio", "remove", "target_params", "own"]


@dataclass(frozen=True)
class Budget:
    """How much has to go.

    Attributes:
        aim: `blocks`: exactly that many blocks; `slice`: that fraction of the hidden directions; `ratio`: that
            fraction of what stands inside blocks; `remove`: the closest non-zero cut to this fraction of all
            parameters; `target_params`: the largest model that has no more than this many parameters; `own`: what the
            method's own knob gives.
        value: a number of blocks, a fraction in [0, 1) or (0, 1), a number of parameters, or the value of the knob.
        knob: name of the method's setting that asks for it, if one does.
    """

    aim: Aim
    value: float
    knob: str | None = None

    @property
    def is_zero(self) -> bool:
        """Whether nothing is to go, which is legal only in a method's own unit."""
        return self.aim in ("blocks", "slice", "ratio") and self.value == 0

    def describe(self) -> dict[str, Any]:
        """Give the request as data for the plan."""
        return {(self.knob or "own") if self.aim == "own" else self.aim: self.value}


def read_budget(
    blocks: int | None = None,
    remove: float | str | None = None,
    target_params: float | str | None = None,
    slice: float | str | None = None,
) -> Budget:
    """Read the one amount that was given.

    Args:
        blocks: number of blocks to take out; 0 changes nothing.
        remove: fraction of all parameters, 0.25 or "25%".
        target_params: parameters to stay at or below, 5500000000 or "5.5B".
        slice: fraction of the hidden directions to slice away, 0.2 or "20%"; 0 changes nothing.

    Raises:
        InputError: none or several given, or a value out of range.
    """
    given = {"blocks": blocks, "slice": slice, "remove": remove, "target_params": target_params}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        what = "no amount given" if not named else f"several amounts given ({', '.join(named)})"
        raise InputError(f"{what}: say one of remove (25%), target-params (5.5B), blocks (4) or slice (20%).")
    if blocks is not None:
        if blocks < 0:
            raise InputError(f"blocks={blocks}: must be 0 or more.")
        return Budget("blocks", blocks)
    if slice is not None:
        return Budget("slice", read_fraction(slice, "slice", zero=True))
    if remove is not None:
        return Budget("remove", read_fraction(remove))
    assert target_params is not None
    return Budget("target_params", read_count(target_params))


def read_fraction(text: float | str, name: str = "remove", *, zero: bool = False) -> float:
    """Read 0.25 or "25%"; `zero` allows 0.

    Raises:
        InputError: not a number, or outside (0, 1).
    """
    stripped = str(text).strip()
    try:
        value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError as error:
        raise InputError(f"{name}={text}: not a number; write 25% or 0.25.") from error
    if not (0 < value < 1 or (zero and value == 0)):
        hint = f" Did you mean {stripped}%?" if 1 <= value < 100 and "%" not in stripped else ""
        raise InputError(f"{name}={text}: must be between 0 and 1 (0 % and 100 %), both excluded.{hint}")
    return value


def read_count(text: float | str) -> float:
    """Read 5500000000, "5.5B", "350M" or "12k".

    Raises:
        InputError: not a positive number.
    """
    stripped = str(text).strip()
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(stripped[-1:].upper(), 1.0)
    try:
        value = float(stripped[:-1] if scale > 1 else stripped) * scale
    except ValueError as error:
        raise InputError(f"target-params={text}: not a number; write 5.5B, 350M or 5500000000.") from error
    if not 0 < value < float("inf"):
        raise InputError(f"target-params={text}: must be a positive number.")
    return value


def choose_blocks(
    budget: Budget,
    candidates: Iterable[tuple[int, ...]],
    block_parameters: tuple[int, ...],
    total: int,
    most: int,
) -> tuple[int, ...]:
    """Take the candidate that meets the budget.

    Args:
        budget: what is asked for.
        candidates: blocks to take out, for 1, 2, … `most` blocks; read only as far as needed.
        block_parameters: number of parameters of each block.
        total: number of all parameters.
        most: how many blocks may go at most.

    Raises:
        InputError: the budget lies outside what these candidates can reach.
    """
    if budget.aim == "blocks":
        return _exactly(int(budget.value), candidates, most)
    wanted = budget.value * total if budget.aim == "remove" else total - budget.value
    if wanted <= 0:
        raise InputError(f"target-params={budget.value:,.0f}: the model has only {total:,} parameters.")
    slack = _ROUNDING if budget.aim == "remove" else 0.0
    smallest = min(block_parameters)
    tried: list[tuple[int, tuple[int, ...]]] = []
    reached: list[int] = []
    for found in candidates:
        tried.append((sum(block_parameters[block] for block in found), found))
        reached += [tried[-1][0]] * (tried[-1][0] >= wanted * (1 - slack))
        if reached and (len(found) + 1) * smallest >= min(reached):
            break  # one more block can no longer come closer
    if not reached:
        raise InputError(_too_much(budget, max(gone for gone, _ in tried), total, most))
    if budget.aim == "target_params":
        return next(found for gone, found in tried if gone == min(reached))
    least = min(gone for gone, _ in tried)
    if wanted < least * (1 - _ROUNDING):
        raise InputError(
            f"remove={budget.value:.1%}: unreachable, this method's smallest cut is {least / total:.1%} (one block)."
        )
    return min(tried, key=lambda one: abs(one[0] - wanted))[1]


def choose_size(budget: Budget, left: Sequence[int], total: int) -> int:
    """Give the position of the candidate that meets a budget of parameters.

    Args:
        budget: `remove` or `target_params`.
        left: parameters that each candidate leaves.
        total: parameters of the dense model.

    Raises:
        InputError: no candidate is smaller than the dense model, or the budget lies outside what they reach.
    """
    smaller = [place for place, parameters in enumerate(left) if parameters < total]
    wanted = total * (1 - budget.value) if budget.aim == "remove" else budget.value
    least, most = (min(left), max((left[place] for place in smaller), default=total))
    if budget.aim == "target_params":
        if wanted >= total:
            raise InputError(f"target-params={budget.value:,.0f}: the model has only {total:,} parameters.")
        below = [place for place in smaller if left[place] <= wanted]
        if below:
            return max(below, key=lambda place: left[place])
    elif smaller and total - wanted <= (total - least) * (1 + _ROUNDING):
        if total - wanted < (total - most) * (1 - _ROUNDING) / 2:
            raise InputError(
                f"remove={budget.value:.1%}: unreachable, this method's smallest cut is {1 - most / total:.1%}."
            )
        return min(smaller, key=lambda place: abs(left[place] - wanted))
    asked = f"remove={budget.value:.1%}" if budget.aim == "remove" else f"target-params={budget.value:,.0f}"
    raise InputError(f"{asked}: unreachable, at most {1 - least / total:.1%} of the parameters can go like this.")


_ROUNDING = 0.005
"""A request this close (relative) to what can be reached counts as reached: 7.2% for 7.17%."""


def _exactly(count: int, candidates: Iterable[tuple[int, ...]], most: int) -> tuple[int, ...]:
    if count > most:
        raise InputError(f"blocks={count}: at most {most} blocks can go (some are protected, and one must stay).")
    return next(found for found in candidates if len(found) == count)


def _too_much(budget: Budget, gone: int, total: int, most: int) -> str:
    asked = f"remove={budget.value:.1%}" if budget.aim == "remove" else f"target-params={budget.value:,.0f}"
    return (
        f"{asked}: unreachable, taking out all {most} blocks that may go removes {gone / total:.1%} of the parameters."
    )
