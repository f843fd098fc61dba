"""How much to remove, as users write it: 25%, 5.5B, 12GB, 1.3. One model for options, recipes, API and report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from secateur.errors import InputError

_COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_BYTES: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


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
    written = str(text).strip().upper()
    unit = next((unit for unit in _COUNTS if written.endswith(unit)), "")
    try:
        value = float(written.removesuffix(unit)) * _COUNTS.get(unit, 1)
    except ValueError as error:
        raise InputError(f"{name}={text}: not a number; write 5.5B, 350M or 5500000000.") from error
    return _positive(value, text, name, "number")


def read_bytes(text: float | str, name: str = "target-memory") -> float:
    """Read 12000000000, "12GB" or "11.5GiB".

    Raises:
        InputError: not a positive number of bytes.
    """
    try:
        value = float(text) if isinstance(text, int | float) else float(_BYTES.validate_python(text.strip()))
    except ValidationError as error:
        raise InputError(f"{name}={text}: not a size; write 12GB, 11.5GiB or 800MB.") from error
    return _positive(value, text, name, "size")


def _positive(value: float, text: float | str, name: str, what: str) -> float:
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


def read_blocks(count: int) -> int:
    """Check a number of blocks.

    Raises:
        InputError: below 0.
    """
    if count < 0:
        raise InputError(f"blocks={count}: must be 0 or more.")
    return count


def gigabytes(count: float) -> str:
    """Format a number of bytes as GB or MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _optional(read: Any) -> BeforeValidator:
    return BeforeValidator(lambda given: None if given is None else read(given))


Fraction = Annotated[float, BeforeValidator(read_fraction)]
"""A share of all parameters, written as 0.25 or 25%."""


class AmountFields(TypedDict, total=False):
    """The amount as keyword arguments of a function; exactly one of them (`context` goes with `target_memory`)."""

    remove: float | str | None
    target_params: float | str | None
    target_memory: float | str | None
    context: int | None
    target_speedup: float | str | None
    blocks: int | None
    slicing: float | str | None


class Amount(BaseModel):
    """How much to remove: one of these, or none where a setting of the method determines it.

    Attributes:
        remove: fraction of all parameters, embeddings included, to remove.
        target_params: maximum number of parameters.
        target_memory: maximum bytes of the weights and one sequence's cache, in the checkpoint's dtype.
        context: tokens in the cache that `target_memory` counts; None: 4096, or the model's maximum positions if fewer.
        target_speedup: required speed-up of a request, by block times measured on the device.
        blocks: number of blocks to remove; 0 changes nothing.
        slicing: fraction of the hidden directions to slice away (`slice` in recipes and plans); 0 changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    remove: Annotated[float | None, _optional(read_fraction)] = None
    target_params: Annotated[float | None, _optional(read_count)] = None
    target_memory: Annotated[float | None, _optional(read_bytes)] = None
    context: int | None = None
    target_speedup: Annotated[float | None, _optional(read_factor)] = None
    blocks: Annotated[int | None, _optional(read_blocks)] = None
    slicing: Annotated[float | None, _optional(lambda text: read_fraction(text, "slice", zero=True))] = Field(
        default=None, alias="slice"
    )

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Amount:
        """Read an amount given by name.

        Raises:
            InputError: an unknown name, several amounts, or a value out of range.
        """
        try:
            found = cls.model_validate(dict(fields))
        except ValidationError as error:
            problem = error.errors()[0]
            raise InputError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}.") from error
        found.require_at_most_one()
        return found

    @property
    def given(self) -> dict[str, float]:
        """The amounts that were given, by the name users write; `context` alone is not an amount."""
        named = self.model_dump(by_alias=True, exclude={"context"}, exclude_none=True)
        return dict(sorted(named.items(), key=lambda item: _ORDER.index(item[0])))

    def fields(self) -> AmountFields:
        """Return the amount as keyword arguments of a function."""
        return {
            "remove": self.remove,
            "target_params": self.target_params,
            "target_memory": self.target_memory,
            "context": self.context,
            "target_speedup": self.target_speedup,
            "blocks": self.blocks,
            "slicing": self.slicing,
        }

    def require_at_most_one(self) -> None:
        """Refuse more than one amount.

        Raises:
            InputError: several were given, or a context without the target it belongs to.
        """
        if len(self.given) > 1:
            raise InputError(f"several amounts given ({', '.join(self.given)}): {_CHOICE}")
        if self.context is not None and (self.target_memory is None or self.context < 1):
            raise InputError(f"context={self.context}: a number of tokens from 1 up, and only beside target-memory.")

    def require_one(self) -> tuple[str, float]:
        """Return the name and value of the amount.

        Raises:
            InputError: none was given, or several.
        """
        self.require_at_most_one()
        if not self.given:
            raise InputError(f"no amount given: {_CHOICE}")
        return next(iter(self.given.items()))

    def describe(self) -> dict[str, Any]:
        """Return the request as data for the plan."""
        return self.model_dump(by_alias=True, exclude_none=True)

    def sentence(self) -> str:
        """Return the amount as it is written on the command line; empty if there is none."""
        writers = {
            "remove": lambda value: f"remove={value:.1%}",
            "target_params": lambda value: f"target-params={value:,.0f}",
            "target_memory": lambda value: f"target-memory={gigabytes(value)}",
            "target_speedup": lambda value: f"target-speedup={value:g}",
            "blocks": lambda value: f"blocks={value:g}",
            "slice": lambda value: f"slice={value:.1%}",
        }
        return ", ".join(writers[name](value) for name, value in self.given.items())


_ORDER = ("blocks", "slice", "remove", "target_params", "target_memory", "target_speedup")
_CHOICE = (
    "give one of remove (25%), target-params (5.5B), target-memory (12GB), target-speedup (1.3), blocks (4) or "
    "slice (20%)."
)
