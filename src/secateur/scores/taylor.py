"""First-order importance of blocks: `Σ_w |w · Σ_batches ∂L/∂w|` over a block's weight matrices and norms.

The backward pass walks block by block as the forward pass does: each block is run again from its stored input and
differentiated alone. So the gradients of one block only are ever in memory, and a skeleton works like a model in
memory.

Source: Kim et al. 2024, "Shortened LLaMA", §3 (Taylor+). There signed products of different samples cancel before the
absolute value is taken; `per_window=True` takes it window by window instead.
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.calibration.backward import back_through, loss_gradients
from secateur.calibration.progress import SILENT, Progress
from secateur.calibration.store import StateStore
from secateur.calibration.stream import Batch, open_store, walk_blocks
from secateur.calibration.texts import Windows
from secateur.errors import NumericsError
from secateur.models.decoder import Decoder


def taylor(
    decoder: Decoder,
    windows: Windows,
    *,
    per_window: bool = False,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> list[float]:
    """Give the Taylor score of each block; the loss is the mean over all predicted tokens.

    Raises:
        NumericsError: NaN or infinity in the forward or backward pass.
    """
    size = 1 if per_window else batch_size
    scores = []
    with open_store(decoder) as kept:
        batches = walk_blocks(decoder, windows, kept, batch_size=size, progress=progress)
        loss_gradients(decoder, batches, kept)
        order = list(reversed(range(decoder.block_count)))
        for index in progress(order, "walking back through the blocks", len(order)):
            scores.append(_block_score(decoder, index, batches, kept, per_window=per_window))
    return scores[::-1]


def _block_score(decoder: Decoder, index: int, batches: list[Batch], kept: StateStore, *, per_window: bool) -> float:
    total = torch.zeros((), dtype=torch.float64)
    with decoder.block(index) as block, torch.enable_grad():
        weights = scored_weights(block)
        for weight in weights:
            weight.requires_grad_(True)
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        try:
            for batch in batches:
                for running, gradient in zip(sums, back_through(decoder, index, batch, kept, weights), strict=True):
                    if gradient is not None:
                        running += gradient.float()
                if per_window:
                    total += _importance(weights, sums)
                    for running in sums:
                        running.zero_()
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        if not per_window:
            total = _importance(weights, sums)
    score = float(total)
    if not torch.isfinite(total):
        raise NumericsError(f"the Taylor score of block {index} is {score}; try --dtype float32.")
    return score


def _importance(weights: list[nn.Parameter], gradients: list[torch.Tensor]) -> torch.Tensor:
    parts = [
        (w.detach().float() * g).abs().sum(dtype=torch.float64).cpu() for w, g in zip(weights, gradients, strict=True)
    ]
    return torch.stack(parts).sum()


def scored_weights(block: nn.Module) -> list[nn.Parameter]:
    """List a block's weight matrices and norm weights; biases are left out, as in the paper."""
    return [parameter for name, parameter in block.named_parameters() if not name.endswith("bias")]
