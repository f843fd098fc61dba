"""Running sums over what enters the projections by which attention and MLP write to the residual stream.

Legend: M = tokens, n = inputs of a projection (heads one after the other, or channels).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.calibration.statistics import device_with_float64
from secateur.calibration.walk import Batch
from secateur.errors import NumericsError
from secateur.models.anatomy import find

_CHUNK_BYTES = 64 << 20


class InputSums:
    """Sums over tokens of one projection's inputs x, float64.

    Attributes:
        tokens: number of tokens M.
        total: Σ x, (n,).
        squares: Σ x², (n,).
        gram: Σ x xᵀ, (n, n); None where it was not asked for.
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
        self.gram = zeros(width, width) if gram else None
        self.magnitudes = zeros(width // unit)
        self._unit = unit

    def update(self, inputs: torch.Tensor, window: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: x, (M, n).
            window: for each token the number of its window in the batch, (M,) int64.
        """
        home, width = self.total.device, self.total.shape[0]
        windows = int(window.max()) + 1 if len(window) else 0
        lengths = torch.zeros(windows, width // self._unit, dtype=torch.float64, device=home)
        rows = max(1, _CHUNK_BYTES // (8 * width))
        for first in range(0, len(inputs), rows):
            exact = inputs[first : first + rows].to(home).double()
            self.total += exact.sum(dim=0)
            self.squares += exact.square().sum(dim=0)
            if self.gram is not None:
                self.gram.addmm_(exact.T, exact)
            owners = window[first : first + rows].to(home)
            lengths.index_add_(0, owners, exact.unflatten(1, (-1, self._unit)).norm(dim=-1))
        counts = torch.bincount(window.to(home), minlength=windows).clamp_min(1)
        self.magnitudes += (lengths / counts[:, None]).square().sum(dim=0)
        self.tokens += len(inputs)

    def require_finite(self, where: str) -> None:
        """Stop at NaN or infinity.

        Raises:
            NumericsError: naming the place.
        """
        if not bool(torch.isfinite(self.squares).all()):
            raise NumericsError(f"NaN or infinity in {where}; the weights may be damaged: try --dtype float32.")

    def mean(self) -> torch.Tensor:
        """Mean input, (n,); 0 where no token came by."""
        return self.total / max(1, self.tokens)

    def variance(self) -> torch.Tensor:
        """Variance of each input over all tokens, (n,)."""
        return (self.squares / max(1, self.tokens) - self.mean().square()).clamp_min(0)


@contextmanager
def collecting_inputs(block: nn.Module, writer: str, batch: Batch, sums: list[InputSums]) -> Iterator[None]:
    """Add to the sums, one per expert, what enters a block's projection `writer` while the block runs on a batch."""
    window = torch.arange(len(batch.tokens)).repeat_interleave(batch.tokens.shape[1])
    real = None if batch.mask is None else batch.mask.flatten().cpu()
    found = find(block, writer)

    def of_linear(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])
        sums[0].update(*(inputs, window) if real is None else (inputs[real.to(inputs.device)], window[real]))

    def of_experts(module: Any, args: tuple[Any, ...]) -> None:
        hidden, chosen = args[0], args[1]
        for number, one in enumerate(sums):
            rows = (chosen == number).any(dim=-1).cpu()
            rows = (rows if real is None else rows & real).nonzero().flatten()
            gate, up = nn.functional.linear(hidden[rows.to(hidden.device)], module.gate_up_proj[number]).chunk(2, -1)
            one.update(module.act_fn(gate) * up, window[rows])

    if isinstance(found, nn.Parameter):
        hook = find(block, writer.rpartition(".")[0]).register_forward_pre_hook(of_experts)
    else:
        hook = found.register_forward_pre_hook(of_linear)
    try:
        yield
    finally:
        hook.remove()
