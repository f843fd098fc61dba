"""`obs-width`, `wanda-sp` and `score` against what they cannot do without, and a chosen ridge against a given one.

    python benchmarks/width_speed.py [MODEL TEXT [WINDOWS [ROUNDS]]]

The floor of `obs-width` is two plain forwards, the Gram products, and an inverse and a solution per block; that of
`wanda-sp` without repair two forwards, that of `score` one. Without a model a random Llama reads random tokens. A block
is run to measure its MLP, and where states are to come back to those of the dense model once more; then its MLP's
output projection is run once edited.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import LENGTH, compare, interleaved, keep, random_llama, random_windows

import secateur
from secateur.calibration.inputs import InputSums
from secateur.calibration.walk import batch_size_for, mean_loss
from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths


def solved(model: Decoder, windows: Windows, kept: int) -> None:
    """Build, invert and solve with one Gram matrix in every block."""
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


def main(name: str = "", text: str = "", windows: int = 8, rounds: int = 1) -> None:
    """Time all in turn; a quarter of the channels goes."""
    model = secateur.open_model(name) if name else random_llama()
    read = windows_for(model, text, windows=windows, seq_len=LENGTH) if name else random_windows(windows)
    channels = block_widths(model, 0).channels
    kept = channels * 3 // 4
    cases = {"obs_width": {}, "given_ridge": {"ridge": 0.1}, "wanda_sp": {"repair": False}}
    cut = {
        case: secateur.make_plan(
            model,
            method="wanda-sp" if case == "wanda_sp" else "obs-width",
            texts=read,
            settings={"ffn": kept} | settings,
        )
        for case, settings in cases.items()
    }

    def forwards() -> None:
        mean_loss(model, read)

    times = interleaved(
        {
            **{case: lambda plan=plan: secateur.prune(model, plan, texts=read) for case, plan in cut.items()},
            "score": lambda: secateur.score(model, texts=read),
            "forward": forwards,
            "solved": lambda: solved(model, read, kept),
        },
        rounds,
        warm=False,
    )
    forward, rest = times["forward"], times["solved"]
    times["two_forwards"] = [(2 * wall, 2 * processor) for wall, processor in forward]
    times["floor"] = [(2 * a + c, 2 * b + d) for (a, b), (c, d) in zip(forward, rest, strict=True)]
    setting = {"model": Path(name).stem if name else "random", "windows": windows, "seq_len": LENGTH, "rounds": rounds}
    setting |= {"blocks": model.block_count, "channels": channels, "kept": kept}
    pairs = (("obs_width", "floor"), ("obs_width", "given_ridge"), ("wanda_sp", "two_forwards"), ("score", "forward"))
    keep("width_speed", setting, {f"{of}/{to}": compare(times, of, to) for of, to in pairs})


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
