"""Sums over tokens of products of inputs: float32 products of few tokens, added up in float64.

Products in float64 cost twice as much as in float32 on a CPU, and on a consumer GPU 32 to 64 times as much. The
products of `ROWS` tokens, rounded to float32, differ from exact ones by some 10⁻⁶ of √(Gᵢᵢ Gⱼⱼ); their sum loses
nothing more. Inputs in float64 are multiplied in float64.
"""

from __future__ import annotations

import torch

ROWS = 512
"""Tokens of one product."""
_COLUMNS = 256


def at_work(inputs: torch.Tensor, home: torch.device) -> torch.Tensor:
    """Return inputs on a device in the precision in which they are multiplied: float32, or float64 if they are that."""
    return inputs.to(home, torch.promote_types(inputs.dtype, torch.float32))


def add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add Leftᵀ Right, for tokens as rows.

    Args:
        into: the sum, (n, m), float64.
        left: (M, n), as `at_work` gives it; so is `right`, (M, m).
    """
    for some, others in zip(left.split(ROWS), right.split(ROWS), strict=True):
        into += some.T @ others


def add_upper(into: torch.Tensor, weighted: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add the upper triangle of Σ w x xᵀ; below the diagonal, only blocks beside it are added.

    Args:
        into: the sum, (n, n), float64.
        weighted: w x, (M, n), as `at_work` gives it; so is `inputs`, x, (M, n).
    """
    for some, others in zip(weighted.split(ROWS), inputs.split(ROWS), strict=True):
        for first in range(0, len(into), _COLUMNS):
            into[first : first + _COLUMNS, first:] += some[:, first : first + _COLUMNS].T @ others[:, first:]


def mirror_upper(into: torch.Tensor) -> None:
    """Write the upper triangle of a matrix (n, n) into its lower one."""
    for first in range(0, len(into), _COLUMNS):
        last = first + _COLUMNS
        into[last:, first:last] = into[first:last, last:].T
        beside = into[first:last, first:last]
        beside.copy_(beside.triu() + beside.triu(1).T)


class GramSum:
    """Running sum Σ w x xᵀ, (n, n), float64: one triangle is added up, and written into the other when it is read."""

    def __init__(self, matrix: torch.Tensor) -> None:
        """Continue a sum, symmetric and (n, n), in place."""
        self._sum, self._is_whole = matrix, True

    @classmethod
    def zero(cls, width: int, home: torch.device | None = None) -> GramSum:
        """Start at zero for n = `width` inputs."""
        return cls(torch.zeros(width, width, dtype=torch.float64, device=home))

    def add(self, weighted: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add tokens: w x and x, both (M, n), as `at_work` gives them."""
        add_upper(self._sum, weighted, inputs)
        self._is_whole = False

    def move_to(self, home: torch.device) -> None:
        """Continue on another device."""
        self._sum = self._sum.to(home)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._sum.device

    @property
    def matrix(self) -> torch.Tensor:
        """The sum so far, (n, n)."""
        if not self._is_whole:
            mirror_upper(self._sum)
            self._is_whole = True
        return self._sum
