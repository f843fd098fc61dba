"""`slicegpt` against what it cannot do without: one plain forward, the covariance products, the eigendecompositions."""

from __future__ import annotations

import torch
from common import compare, interleaved, keep, random_llama, random_windows

from secateur.calibration.walk import batch_size_for, mean_loss
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.surgery.hidden.directions import Covariance, principal_directions
from secateur.surgery.hidden.own_bases import slice_by_principal_directions


def floor(model: Decoder, windows: Windows) -> None:
    """Run the model once, and build and decompose one covariance at every reading point (the head has none)."""
    mean_loss(model, windows)
    width = model.hidden_size
    states = torch.randn(batch_size_for(model, windows), windows.seq_len, width).flatten(0, 1)
    for _ in range(2 * model.block_count):
        covariance = Covariance(width)
        for first in range(0, windows.token_count, len(states)):
            covariance.update(states[: windows.token_count - first])
        principal_directions(covariance.matrix())


def main(windows: int = 32, length: int = 512, slice_percentage: float = 0.25, rounds: int = 3) -> None:
    """Time both in turn."""
    model = random_llama()
    read = random_windows(windows, length)
    kept = int(model.hidden_size * (1 - slice_percentage)) // 8 * 8
    seconds = interleaved(
        {
            "slicegpt": lambda: slice_by_principal_directions(
                model, read, [kept] * model.block_count, model.hidden_size
            ),
            "floor": lambda: floor(model, read),
        },
        rounds,
    )
    setting = {"windows": windows, "seq_len": length, "width": 768, "blocks": 12, "kept": kept, "rounds": rounds}
    keep("slice_speed", setting, compare(seconds, "slicegpt", "floor"))


if __name__ == "__main__":
    main()
