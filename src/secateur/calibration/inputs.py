"""Running sums over the inputs of the output projections of attention and MLP.

Legend: M = tokens, n = inputs of a projection (heads one after the other, or channels).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.calibration.products import GramSum, add_product, at_work
from secateur.calibration.statistics import device_with_float64
from secateur.calibration.walk import Batch
from secateur.errors import NumericsError
from secateur.models.anatomy import find, holds_transposed

_CHUNK_BYTES = 64 << 20


class Moments:
    """Weighted sums over tokens of one projection's inputs x, and of what its output lacks, float64.

    Attributes:
        weight: Σ w.
        total: Σ w x, (n,).
        cross: Σ w x mᵀ, (n, out), m being what the output lacks; None if it lacks nothing.
        lacking: Σ w ‖m‖².
    """

    def __init__(
        self,
        weight: torch.Tensor,
        total: torch.Tensor,
        gram: torch.Tensor,
        cross: torch.Tensor | None = None,
        lacking: torch.Tensor | float = 0.0,
    ) -> None:
        """Wrap existing sums."""
        self.weight, self.total, self.cross, self.lacking = weight, total, cross, lacking
        self._gram = GramSum(gram)

    @property
    def gram(self) -> torch.Tensor:
        """Return Σ w x xᵀ, (n, n)."""
        return self._gram.matrix

    @classmethod
    def zero(cls, width: int, home: torch.device) -> Moments:
        """Start at zero for n = `width` inputs."""
        zeros = [torch.zeros(shape, dtype=torch.float64, device=home) for shape in ((), (width,), (width, width))]
        return cls(*zeros)

    def add(self, inputs: torch.Tensor, weight: torch.Tensor, lacking: torch.Tensor | None = None) -> None:
        """Add tokens: x (M, n), w (M,) and perhaps m (M, out), as `at_work` gives them."""
        weighted = inputs * weight[:, None]
        self.weight += weight.sum(dtype=torch.float64)
        self.total += weighted.sum(dim=0, dtype=torch.float64)
        self._gram.add(weighted, inputs)
        if lacking is not None:
            if self.cross is None:
                self.cross = self.total.new_zeros(len(self.total), lacking.shape[1])
            add_product(self.cross, weighted, lacking)
            self.lacking += (weight[:, None] * lacking.square()).sum(dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        """Return the sums over the tokens of both."""
        cross = self.cross if other.cross is None else other.cross if self.cross is None else self.cross + other.cross
        sums = (self.weight + other.weight, self.total + other.total, self.gram + other.gram)
        return Moments(*sums, cross, self.lacking + other.lacking)

    def mean(self) -> torch.Tensor:
        """Return the weighted mean input, (n,); 0 if there were no tokens."""
        return self.total / torch.where(self.weight > 0, self.weight, 1.0)

    def gram_about(self, point: torch.Tensor) -> torch.Tensor:
        """Return Σ w (x − p)(x − p)ᵀ for a point p (n,)."""
        crossed = torch.outer(self.total, point)
        return self.gram - crossed - crossed.T + self.weight * torch.outer(point, point)

    def about(self, point: torch.Tensor) -> Moments:
        """Return the sums of inputs less a point p (n,), where the output lacks nothing."""
        assert self.cross is None, "what the output lacks is not centred"
        return Moments(self.weight, self.total - self.weight * point, self.gram_about(point))


class InputSums:
    """Sums over tokens of one projection's inputs x, float64.

    Attributes:
        tokens: number of tokens M.
        total: Σ x, (n,).
        squares: Σ x², (n,).
        fitted: weighted sums over the tokens on which a fit is made; None if they were not requested.
        held_out: weighted sums over the tokens that evaluate the fit; None if they were not requested.
        magnitudes: for each unit of `unit` neighbouring inputs the sum over windows of (the mean over the window's
            tokens of its length)², (n / unit,).
    """

    def __init__(self, width: int, device: torch.device, *, unit: int = 1, gram: bool = True) -> None:
        """Start at zero for n = `width` inputs."""
        home = device_with_float64(device)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=home)

        self.tokens = 0
        self.total, self.squares = zeros(width), zeros(width)
        self.fitted = Moments.zero(width, home) if gram else None
        self.held_out: Moments | None = None
        self.magnitudes = zeros(width // unit)
        self._unit = unit

    @property
    def moments(self) -> Moments | None:
        """Weighted sums over all tokens; None if they were not requested."""
        if self.fitted is None or self.held_out is None:
            return self.fitted
        return self.fitted + self.held_out

    def update(
        self,
        inputs: torch.Tensor,
        window: torch.Tensor,
        weight: torch.Tensor | None = None,
        held_out: torch.Tensor | None = None,
        lacking: torch.Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            inputs: x, (M, n).
            window: for each token the number of its window in the batch, (M,) int64.
            weight: w, of each token in a fit, (M,); None: 1.
            held_out: whether a token evaluates the fit instead of taking part in it, (M,) bool; None: none does.
            lacking: m, what the projection's output should be more than it is, (M, out); None: nothing.
        """
        home, width = self.total.device, self.total.shape[0]
        windows = int(window.max()) + 1 if len(window) else 0
        lengths = torch.zeros(windows, width // self._unit, dtype=torch.float64, device=home)
        rows = max(1, _CHUNK_BYTES // (4 * width))
        for first in range(0, len(inputs), rows):
            some = at_work(inputs[first : first + rows], home)
            self.total += some.sum(dim=0, dtype=torch.float64)
            self.squares += some.square().sum(dim=0, dtype=torch.float64)
            self._add_moments(
                some, *(None if one is None else one[first : first + rows] for one in (weight, held_out, lacking))
            )
            owners = window[first : first + rows].to(home)
            lengths.index_add_(0, owners, some.unflatten(1, (-1, self._unit)).norm(dim=-1).double())
        counts = torch.bincount(window.to(home), minlength=windows).clamp_min(1)
        self.magnitudes += (lengths / counts[:, None]).square().sum(dim=0)
        self.tokens += len(inputs)

    def _add_moments(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor | None,
        held_out: torch.Tensor | None,
        lacking: torch.Tensor | None,
    ) -> None:
        if self.fitted is None:
            return
        heavy = inputs.new_ones(len(inputs)) if weight is None else weight.to(inputs)
        missed = None if lacking is None else lacking.to(inputs)
        if held_out is None or not bool(held_out.any()):
            self.fitted.add(inputs, heavy, missed)
            return
        if self.held_out is None:
            self.held_out = Moments.zero(inputs.shape[1], inputs.device)
        held_out = held_out.cpu()
        bounds = [0, *((held_out[1:] != held_out[:-1]).nonzero().flatten() + 1).tolist(), len(inputs)]
        for first, last in itertools.pairwise(bounds):  # runs of neighbours are views: nothing is copied
            run = slice(first, last)
            into = self.held_out if held_out[first] else self.fitted
            into.add(inputs[run], heavy[run], None if missed is None else missed[run])

    def require_finite(self, where: str) -> None:
        """Refuse NaN and infinity.

        Raises:
            NumericsError: naming the place.
        """
        if not bool(torch.isfinite(self.squares).all()):
            raise NumericsError(f"NaN or infinity in {where}; the weights may be damaged: try --dtype float32.")

    def mean(self) -> torch.Tensor:
        """Return the mean input, (n,); 0 if there were no tokens."""
        return self.total / max(1, self.tokens)

    def variance(self) -> torch.Tensor:
        """Return the variance of each input over all tokens, (n,)."""
        return (self.squares / max(1, self.tokens) - self.mean().square()).clamp_min(0)


@dataclass(frozen=True)
class Captured:
    """The inputs of a projection in a run of a block on a batch.

    Attributes:
        expert: number of the expert; 0 if there is none.
        inputs: x of real tokens, (M, n).
        rows: their indices among all tokens of the batch, window after window, (M,) int64.
    """

    expert: int
    inputs: torch.Tensor
    rows: torch.Tensor


@contextmanager
def capturing_inputs(block: nn.Module, writer: str, batch: Batch, experts: int) -> Iterator[list[Captured]]:
    """Fill a list with the inputs of a block's projection `writer`, of each expert, while the block runs on a batch."""
    real = torch.ones(batch.tokens.numel(), dtype=torch.bool) if batch.mask is None else batch.mask.flatten().cpu()
    found, captured = find(block, writer), list[Captured]()

    def of_linear(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])
        inputs = inputs if batch.mask is None else inputs[real.to(inputs.device)]
        captured.append(Captured(0, inputs, real.nonzero().flatten()))

    def of_experts(module: Any, args: tuple[Any, ...]) -> None:
        if len(args) == 1:  # Llama 4: each expert gets all tokens, those that are not for it as zeros
            for number, states in enumerate(args[0].view(experts, -1, args[0].shape[-1])):
                rows = (states.any(dim=-1).cpu() & real).nonzero().flatten()
                captured.append(Captured(number, inside_expert(module, number, states[rows.to(states.device)]), rows))
            return
        hidden, chosen = args[0], args[1]
        for number in range(experts):
            rows = ((chosen == number).any(dim=-1).cpu() & real).nonzero().flatten()
            captured.append(Captured(number, inside_expert(module, number, hidden[rows.to(hidden.device)]), rows))

    if isinstance(found, nn.Parameter):
        hook = find(block, writer.rpartition(".")[0]).register_forward_pre_hook(of_experts)
    else:
        hook = found.register_forward_pre_hook(of_linear)
    try:
        yield captured
    finally:
        hook.remove()


def inside_expert(experts: Any, number: int, states: torch.Tensor) -> torch.Tensor:
    """Return what enters the output projection of one of the stacked experts, given the states that it is sent."""
    name = "up_proj" if getattr(experts, "gate_up_proj", None) is None else "gate_up_proj"
    weight = getattr(experts, name)[number]
    bias = getattr(experts, f"{name}_bias", None)
    found = nn.functional.linear(
        states, weight.T if holds_transposed(experts) else weight, None if bias is None else bias[number]
    )
    if name == "up_proj":
        return experts.act_fn(found)
    gated = getattr(experts, "_apply_gate", None)
    if gated is not None:
        return gated(found)
    gate, up = found.chunk(2, dim=-1)
    return experts.act_fn(gate) * up
