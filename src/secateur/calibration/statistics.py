"""Statistics of the residual stream over calibration tokens, as running sums fed batch by batch.

Cosines and angular distances between states, relative magnitudes, CKA, and normal equations for least squares.

Legend: S = L+1 states, M = tokens, d = width of the residual stream. Sums are float64; every class has `update`
and `result`, and counts real tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from secateur.calibration.products import GramSum, add_product, at_work
from secateur.calibration.ridge import GRID, UNJUDGED, held_out_gains, safest, strength
from secateur.distributed import add_up
from secateur.errors import InputError, NumericsError

_CHUNK_BYTES = 16 << 20
_TINY = 1e-30

Kernel = Literal["linear", "rbf"]


def real_tokens(states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Flatten states (windows, positions, d) to real tokens (M, d)."""
    if mask is None:
        return [state.flatten(0, 1) for state in states]
    return [state[mask.to(state.device)] for state in states]


class CosineSums:
    """Mean cosine between every two states of a token, `E_t cos(X^a_t, X^b_t)`.

    For a = l and b = l+n this is the window cosine C(l, n) of LLM-Streamline (Chen et al. 2024, section 3.1). With the
    states of each token normalised to length 1 in the rows of Z (S × M·d), the sum over tokens is one product, Z Zᵀ.
    """

    def __init__(self, states: int) -> None:
        """Start at zero for `states` = L+1 states."""
        self._sum = torch.zeros(states, states, dtype=torch.float64)
        self._relative = torch.zeros(states - 1, dtype=torch.float64)
        self._tokens = torch.zeros((), dtype=torch.int64)

    def update(self, states: Sequence[torch.Tensor]) -> None:
        """Add tokens; `states` holds S tensors (M, d)."""
        tokens, width = states[0].shape
        rows = max(1, _CHUNK_BYTES // (4 * width * len(states)))
        for first in range(0, tokens, rows):
            chunk = torch.stack([state[first : first + rows].float().to(states[0].device) for state in states])
            length_SM = chunk.norm(dim=-1).clamp_min(_TINY)
            change_LM = (chunk[1:] - chunk[:-1]).norm(dim=-1)
            self._relative += (change_LM / length_SM[1:]).sum(dim=-1).cpu().double()
            unit_SX = chunk.div_(length_SM[..., None]).flatten(1)
            self._sum += (unit_SX @ unit_SX.T).cpu().double()
        self._tokens += tokens

    def combine(self) -> None:
        """Add the sums of the other processes."""
        add_up(self._sum, self._relative, self._tokens)

    def result(self) -> torch.Tensor:
        """Return the mean cosines, (S, S), diagonal exactly 1."""
        mean = (self._sum / self._tokens).clamp(-1, 1)
        return mean.fill_diagonal_(1.0)

    def relative_magnitude(self) -> torch.Tensor:
        """Return `E_t ‖f_l(X)−X‖ / ‖f_l(X)‖` of each block, (L,) (Samragh et al. 2023)."""
        return self._relative / self._tokens


class AngularSums:
    """Mean angular distance `arccos(cos) / π` between states of each window's last real token (Gromov et al. 2024)."""

    def __init__(self, states: int) -> None:
        """Start at zero for `states` = L+1 states."""
        self._sum = torch.zeros(states, states, dtype=torch.float64)
        self._windows = torch.zeros((), dtype=torch.int64)

    def update(self, states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> None:
        """Add windows; states are (windows, positions, d), the mask (windows, positions)."""
        windows, positions, _ = states[0].shape
        if mask is None:
            last = torch.full((windows,), positions - 1)
        else:
            last = positions - 1 - mask.cpu().flip(1).int().argmax(dim=1)
        rows = torch.arange(windows)
        picked = torch.stack(
            [state[rows.to(state.device), last.to(state.device)].cpu().double() for state in states], dim=1
        )
        unit = picked / picked.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        angle = torch.arccos((unit @ unit.transpose(1, 2)).clamp(-1, 1)) / torch.pi
        self._sum += angle.sum(dim=0)
        self._windows += windows

    def combine(self) -> None:
        """Add the sums of the other processes."""
        add_up(self._sum, self._windows)

    def result(self) -> torch.Tensor:
        """Return the mean angular distances in [0, 1], (S, S), diagonal exactly 0."""
        return (self._sum / self._windows).fill_diagonal_(0.0)


class LinearSums:
    """Normal equations for a matrix T that maps part of a state so that the state approximates another one.

    With P (M × d) a part of the state X = R + P, the T that brings R + P T closest to Y solves
    Pᵀ W P (T − I) = Pᵀ W (Y − X) with W the weights of tokens. A ridge on the left-hand side shrinks T toward the
    identity, not toward 0. Held-out tokens are summed up apart: they show what a ridge is worth.
    """

    def __init__(self, width: int) -> None:
        """Start at zero for states of this width d."""
        self._grams = [GramSum.zero(width) for _ in range(2)]  # fitted tokens, then held-out ones
        self._cross = torch.zeros(2, width, width, dtype=torch.float64)
        self._squares = torch.zeros(2, 2, dtype=torch.float64)

    def update(
        self,
        part: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        weight: torch.Tensor | None = None,
        held_out: torch.Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            part: P, (M, d).
            before: X, (M, d).
            after: Y, (M, d).
            weight: of each token, (M,); None: 1.
            held_out: whether a token evaluates fits instead of taking part in them, (M,) bool; None: none does.
        """
        self._move_to(device_with_float64(part.device))
        home = self._cross.device
        heavy = torch.ones(len(part), device=home) if weight is None else weight.to(home)
        folds = torch.zeros(len(part), dtype=torch.bool) if held_out is None else held_out.cpu()
        rows = max(1, _CHUNK_BYTES // (4 * part.shape[1]))
        for fold in folds.unique().tolist():
            chosen = (folds == fold).nonzero().flatten()
            for some in chosen.split(rows):
                part_Md, before_Md, after_Md = (
                    at_work(one[some.to(one.device)], home) for one in (part, before, after)
                )
                weight_M1 = heavy[some.to(home)].to(part_Md)[:, None]
                weighted_Md, change_Md = part_Md * weight_M1, after_Md - before_Md
                self._grams[int(fold)].add(weighted_Md, part_Md)
                add_product(self._cross[int(fold)], weighted_Md, change_Md)
                squares = (weight_M1 * change_Md.square(), weight_M1 * after_Md.square())
                self._squares[int(fold)] += torch.stack([one.sum(dtype=torch.float64) for one in squares])

    def combine(self) -> None:
        """Add the sums of the other processes; the end of adding."""
        add_up(*(one.matrix for one in self._grams), self._cross, self._squares)
        self._move_to(torch.device("cpu"))

    def _move_to(self, home: torch.device) -> None:
        for gram in self._grams:
            gram.move_to(home)
        self._cross, self._squares = self._cross.to(home), self._squares.to(home)

    @property
    def _gram(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pᵀ W P over fitted and over held-out tokens, (d, d) each."""
        fitted, held_out = self._grams
        return fitted.matrix, held_out.matrix

    @property
    def has_held_out(self) -> bool:
        """Whether tokens were held out."""
        return float(self._squares[1, 1]) > 0

    def best_ridge(self) -> float | None:
        """Return the largest ridge that is nearly best on held-out tokens, None for T = I; 0.1 if none were.

        Raises:
            NumericsError: as for `result`.
        """
        self._require_defined()
        if not self.has_held_out:
            return UNJUDGED
        (gram, held_gram), (cross, held_cross) = self._gram, self._cross
        gains = held_out_gains(gram, cross, held_gram, held_cross, [strength(gram, ridge) for ridge in GRID])
        return safest(gains, GRID)

    def result(self, ridge: float | None) -> torch.Tensor:
        """Return T, (d, d), fitted on all tokens, which acts on rows: P T.

        Args:
            ridge: added to the diagonal of Pᵀ W P, as a multiple of its mean; None gives I.

        Raises:
            NumericsError: NaN or infinity in the sums, or a part that is 0 everywhere.
        """
        self._require_defined()
        return self._solved(torch.add(*self._gram), self._cross.sum(dim=0), ridge)

    def held_out_error(self, ridge: float | None) -> float:
        """Return the error on held-out tokens of the T fitted on the others; if there are none, that on all.

        Raises:
            NumericsError: as for `result`.
        """
        self._require_defined()
        if not self.has_held_out:
            return self.error(self.result(ridge))
        fitted = self._solved(self._gram[0], self._cross[0], ridge)
        return _share_missed(fitted, self._gram[1], self._cross[1], self._squares[1])

    def error(self, matrix_dd: torch.Tensor) -> float:
        """Return Σ w ‖R + P T − Y‖² / Σ w ‖Y‖² over all tokens for this T."""
        return _share_missed(matrix_dd, torch.add(*self._gram), self._cross.sum(dim=0), self._squares.sum(dim=0))

    def _require_defined(self) -> None:
        scale = float(self._grams[0].matrix.diagonal().mean())
        if not (math.isfinite(scale) and scale > 0 and bool(torch.isfinite(self._cross).all())):
            raise NumericsError("the matrix that replaces the blocks is undefined: the MLP's output is 0 or NaN.")

    def _solved(self, gram: torch.Tensor, cross: torch.Tensor, ridge: float | None) -> torch.Tensor:
        identity = torch.eye(len(gram), dtype=torch.float64)
        if ridge is None:
            return identity
        return identity + _solve_symmetric(gram + strength(gram, ridge) * identity, cross)


def _share_missed(matrix_dd: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, squares: torch.Tensor) -> float:
    change = matrix_dd - torch.eye(len(matrix_dd), dtype=torch.float64)
    difference, target = squares.tolist()
    missed = difference - 2 * (change * cross).sum() + (change * (gram @ change)).sum()
    return max(float(missed), 0.0) / target


class CkaSums:
    """Centred kernel alignment between block outputs, by unbiased minibatch HSIC.

    At most `limit` tokens, sampled by seed, are collected in order into minibatches of `size`. HSIC is estimated
    without bias in each (Nguyen, Raghu, Kornblith 2021) and averaged before the ratio is taken. The RBF width of a
    block is the median distance of its outputs in the first minibatch.
    """

    def __init__(
        self,
        total_tokens: int,
        *,
        seed: int = 0,
        limit: int = 4096,
        size: int = 256,
        numbers: torch.Tensor | None = None,
    ) -> None:
        """Choose the tokens.

        Args:
            total_tokens: how many real tokens there are.
            seed: random seed of the sample.
            limit: largest number of tokens.
            size: tokens of a minibatch.
            numbers: in a multi-process run, the numbers of the tokens this process sees, in order; None is all.

        Raises:
            InputError: fewer than 4 tokens, too few for an unbiased HSIC.
        """
        if total_tokens < 4:
            raise InputError(f"CKA needs at least 4 tokens, there are {total_tokens}.")
        self._size = min(size, total_tokens)
        count = min(limit, total_tokens) // self._size * self._size
        generator = torch.Generator().manual_seed(seed)
        self._chosen = torch.randperm(total_tokens, generator=generator)[:count].sort().values
        self._numbers = numbers
        self._apart: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._passed = 0
        self._waiting: list[torch.Tensor] = []
        self._hsic: dict[Kernel, torch.Tensor] = {}
        self._widths: torch.Tensor | None = None
        self._batches = 0

    def update(self, outputs: Sequence[torch.Tensor]) -> None:
        """Add tokens: L tensors (M, d), the outputs of the blocks."""
        tokens = outputs[0].shape[0]
        if self._numbers is not None:
            self._keep_for_exchange(outputs, self._numbers[self._passed : self._passed + tokens])
            self._passed += tokens
            return
        inside = self._chosen[(self._chosen >= self._passed) & (self._chosen < self._passed + tokens)] - self._passed
        self._passed += tokens
        while len(inside):
            waiting = sum(part.shape[1] for part in self._waiting)
            taken, inside = inside[: self._size - waiting], inside[self._size - waiting :]
            self._waiting.append(_picked(outputs, taken, device_with_float64(outputs[0].device)))
            if waiting + len(taken) == self._size:
                self._add_minibatch(torch.cat(self._waiting, dim=1))
                self._waiting = []

    def _keep_for_exchange(self, outputs: Sequence[torch.Tensor], numbers: torch.Tensor) -> None:
        """Keep the sampled ones among the tokens of these numbers, with their positions in the sample."""
        places = torch.searchsorted(self._chosen, numbers).clamp_max(len(self._chosen) - 1)
        here = (self._chosen[places] == numbers).nonzero().flatten()
        self._apart.append((places[here], _picked(outputs, here, torch.device("cpu"))))

    def combine(self) -> None:
        """Assemble the minibatches from all processes; every process computes them."""
        if self._numbers is None:
            return
        places = torch.cat([one for one, _ in self._apart])
        outputs = torch.cat([one for _, one in self._apart], dim=1)
        for first in range(0, len(self._chosen), self._size):
            mine = (places >= first) & (places < first + self._size)
            minibatch = torch.zeros(outputs.shape[0], self._size, outputs.shape[2])
            minibatch[:, places[mine] - first] = outputs[:, mine]
            add_up(minibatch)
            self._add_minibatch(minibatch)
        self._apart.clear()

    def _add_minibatch(self, outputs_LMd: torch.Tensor) -> None:
        gram = [output.double() @ output.double().T for output in outputs_LMd]
        squared = [_squared_distances(one) for one in gram]
        if self._widths is None:
            self._widths = torch.stack([_median_distance(one) for one in squared])
        rbf = [torch.exp(-one / (2 * width**2)) for one, width in zip(squared, self._widths, strict=True)]
        kernels: dict[Kernel, list[torch.Tensor]] = {"linear": gram, "rbf": rbf}
        for name, matrices in kernels.items():
            found = unbiased_hsic(torch.stack(matrices)).cpu()
            self._hsic[name] = self._hsic.get(name, torch.zeros_like(found)) + found
        self._batches += 1

    def result(self, kernel: Kernel) -> torch.Tensor:
        """Return the CKA between block outputs, (L, L), symmetric, diagonal exactly 1.

        Raises:
            NumericsError: a block's outputs do not vary, so that its HSIC with itself is not positive.
        """
        hsic = self._hsic[kernel] / self._batches
        own = hsic.diagonal()
        if not bool((own > 0).all()):
            block = int((own <= 0).nonzero()[0])
            raise NumericsError(f"CKA is undefined: the outputs of block {block} do not vary over the tokens.")
        cka = hsic / torch.sqrt(own[:, None] * own[None, :])
        return ((cka + cka.T) / 2).fill_diagonal_(1.0)


def _picked(outputs: Sequence[torch.Tensor], rows: torch.Tensor, home: torch.device) -> torch.Tensor:
    return torch.stack([output[rows.to(output.device)].float().to(home) for output in outputs])


def unbiased_hsic(kernels_LMM: torch.Tensor) -> torch.Tensor:
    """Return the unbiased HSIC of all pairs of kernel matrices, (L, L) (Song et al. 2012, eq. 5)."""
    samples = kernels_LMM.shape[-1]
    kernels = kernels_LMM.double() * (1 - torch.eye(samples, dtype=torch.float64, device=kernels_LMM.device))
    flat = kernels.flatten(1)
    rows = kernels.sum(dim=-1)
    total = rows.sum(dim=-1)
    trace = flat @ flat.T
    products = torch.outer(total, total) / ((samples - 1) * (samples - 2))
    crossed = 2 / (samples - 2) * (rows @ rows.T)
    return (trace + products - crossed) / (samples * (samples - 3))


def device_with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _solve_symmetric(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve a positive definite system; if the matrix is singular, return the minimum-norm solution.

    It counts as singular where an eigenvalue is no larger than the rounding of float32 products.
    """
    rounding = 1e-6 * left.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(left)
    if not failed and factor.diagonal().square().min() > rounding:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(left)
    kept = values > rounding
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def _squared_distances(gram: torch.Tensor) -> torch.Tensor:
    square = gram.diagonal()
    return (square[:, None] + square[None, :] - 2 * gram).clamp_min(0)


def _median_distance(squared: torch.Tensor) -> torch.Tensor:
    off_diagonal = ~torch.eye(len(squared), dtype=torch.bool, device=squared.device)
    return squared[off_diagonal].median().sqrt().clamp_min(_TINY)
