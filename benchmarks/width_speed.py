"""`obs-width` against what it cannot do without: two plain forwards, the Gram products, an inverse and a solution each.

Without heads to take out, a block is run twice: to measure its MLP, and once edited.
"""

from __future__ import annotations

import torch
from common import compare, interleaved, keep, random_llama, random_windows

import secateur
from secateur.calibration.inputs import InputSums
from secateur.calibration.walk import batch_size_for, mean_loss
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths


def floor(model: Decoder, windows: Windows, kept: int) -> None:
    """Run the model twice; build, invert and solve with one Gram matrix in every block."""
    for _ in range(2):
        mean_loss(model, windows)
    channels = block_widths(model, 0).channels
    inputs = torch.randn(batch_size_for(model, windows) * windows.seq_len, channels)
    owner = torch.zeros(len(inputs), dtype=torch.long)
    for _ in range(model.block_count):
        sums = InputSums(channels, model.device)
        for first in range(0, windows.token_count, len(inputs)):
            sums.update(inputs[: windows.token_count - first], owner[: windows.token_count - first])
        assert sums.fitted is not None
        gram = sums.fitted.gram
        torch.linalg.inv(gram)
        torch.linalg.solve(gram[:kept, :kept], torch.randn(kept, model.hidden_size, dtype=torch.float64))


def main(windows: int = 8, length: int = 512, kept: int = 1536, rounds: int = 1) -> None:
    """Time both in turn; a quarter of 2048 channels goes."""
    model = random_llama()
    read = random_windows(windows, length)
    plan = secateur.make_plan(model, method="obs-width", texts=read, settings={"ffn": kept})
    seconds = interleaved(
        {
            "obs_width": lambda: secateur.prune(model, plan, texts=read),
            "floor": lambda: floor(model, read, kept),
        },
        rounds,
    )
    setting = {"windows": windows, "seq_len": length, "width": 768, "blocks": 12, "kept": kept, "rounds": rounds}
    keep("width_speed", setting, compare(seconds, "obs_width", "floor"))


if __name__ == "__main__":
    main()
