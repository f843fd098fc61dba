"""Amounts as people write them: 25%, 5.5B, 12GB, 1.3."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.errors import InputError

_COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_BYTES = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


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


def read_count(text: float | str, name: str = "target-params") -> float:
    """Read 5500000000, "5.5B", "350M" or "12k".

    Raises:
        InputError: not a positive number.
    """
    return _read_scaled(name, text, _COUNTS, "number", "5.5B, 350M or 5500000000")


def read_bytes(text: float | str) -> float:
    """Read 12000000000, "12GB" or "11.5GiB".

    Raises:
        InputError: not a positive number of bytes.
    """
    return _read_scaled("target-memory", text, _BYTES, "size", "12GB, 11.5GiB or 800MB")


def _read_scaled(name: str, text: float | str, scales: Mapping[str, float], what: str, examples: str) -> float:
    """Read a positive number with or without one of these units behind it."""
    written = str(text).strip().upper()
    unit = next((unit for unit in scales if written.endswith(unit)), "")
    try:
        value = float(written.removesuffix(unit)) * scales.get(unit, 1)
    except ValueError as error:
        raise InputError(f"{name}={text}: not a {what}; write {examples}.") from error
    if not 0 < value < float("inf"):
        raise InputError(f"{name}={text}: must be a positive {what}.")
    return value


def read_factor(text: float | str) -> float:
    """Read 1.3, "1.3" or "1.3x".

    Raises:
        InputError: not a number above 1.
    """
    try:
        value = float(str(text).strip().lower().removesuffix("x"))
    except ValueError as error:
        raise InputError(f"target-speedup={text}: not a number; write 1.3 for 1.3 times as fast.") from error
    if not 1 < value < float("inf"):
        raise InputError(f"target-speedup={text}: must be above 1; 1.3 is 1.3 times as fast.")
    return value


def gigabytes(count: float) -> str:
    """Write a number of bytes as people do."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
